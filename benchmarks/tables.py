"""Tables in Markdown, and numbers with their spread."""

from statistics import mean, stdev

from scipy.stats import t as student


def rows(heading: list[str], body: list[list[str]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], form: str) -> str:
    """Mean, and lowest to highest where they differ."""
    text = format(mean(values), form)
    if len(values) == 1 or min(values) == max(values):
        return text
    return f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def interval(values: list[float]) -> tuple[float, float]:
    """The 95% interval of the mean, by Student's distribution; of two values or more."""
    margin = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - margin, mean(values) + margin
