"""Tables in Markdown, and numbers with their spread."""

from statistics import mean


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
