"""Predictions of a teacher as targets: the most probable tokens, kept on disk, and the divergence from them.

Legend: B examples, K most probable tokens, N positions, T tokens, V vocabulary.
"""

import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wandazeta.models.modes import evaluation_mode
from wandazeta.scoring.scorer import Prepared, Scorer

__all__ = ["NUM_TOP", "TeacherTargets", "divergence", "teacher_loss"]

NUM_TOP = 64
"""Tokens of a position that are kept, in 386 bytes. All others are one more outcome, so that no probability is lost."""

# positions whose float32 logits exist at a time: few enough for the cache of a processor
_CHUNK = 64
_LOWEST = torch.finfo(torch.float16).min


class TeacherTargets:
    """Most probable next tokens of a frozen model and their log-probabilities, computed once for each text.

    The log-probability of all other tokens together is kept as one more value. Values are rounded to float16 before
    they are used, so that a target is the same whether it was computed or read. Every text is run alone, so that its
    target does not depend on its batch.

    Texts of one length are in one file, found by a digest of their tokens: order, epochs and seeds do not matter. A
    target counts if its checksum fits, so a process that is killed while it writes leaves none that is wrong.

    Args:
        model: Causal language model of transformers.
        folder: Folder of the files.
        key: What the predictions depend on besides the texts: the model and its precision.
        num_tokens: Size of the student's vocabulary V; predictions of other tokens are left out.
    """

    def __init__(self, model: nn.Module, folder: Path, key: str, num_tokens: int) -> None:
        self.model = model
        self.num_computed = 0
        """Texts that the model was run on by this object."""
        self._scorer = Scorer(model)
        self._folder = folder
        self._key = key
        self._num_tokens = num_tokens
        self._num_top = min(NUM_TOP, num_tokens - 1)
        self._files: dict[int, _TargetFile] = {}

    def of(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets of texts, and run the model on those that have none yet.

        Args:
            ids_BT: Token ids.
            mask_BT: Attention mask.

        Returns:
            Token ids `(B, T, K)` int64, and log-probabilities `(B, T, K + 1)` float32 whose last value is that of all
            other tokens.
        """
        if next(self.model.parameters()).device != ids_BT.device:
            self.model.to(ids_BT.device)
        file = self._file(ids_BT.shape[1])
        found = []
        for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True):
            digest = sha256(torch.stack([ids_T, mask_T]).cpu().numpy().tobytes()).digest()
            stored = file.read(digest)
            if stored is None:
                stored = self._compute({"input_ids": ids_T[None], "attention_mask": mask_T[None]})
                file.append(digest, *stored)
            found.append(stored)
        ids = torch.from_numpy(np.stack([ids for ids, _ in found])).to(ids_BT.device, torch.int64)
        logprobs = torch.from_numpy(np.stack([values for _, values in found])).to(ids_BT.device, torch.float32)
        # rounded values do not add up to one exactly
        return ids, logprobs.log_softmax(-1)

    @torch.no_grad()
    def _compute(self, batch: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Run the model on one text: ids `(T, K)` int32, log-probabilities `(T, K + 1)` float16."""
        self.num_computed += 1
        with evaluation_mode(self.model.modules()):
            logits_TV = self._scorer.token_logits(self._scorer.prepare(batch))[0, :, : self._num_tokens]
        ids, logprobs = [], []
        for chunk in logits_TV.split(_CHUNK):
            values, places = chunk.topk(self._num_top)
            rest = _rest(chunk, places)
            ids.append(places.to(torch.int32))
            logprobs.append(torch.cat([values.float(), rest[:, None]], 1).log_softmax(1))
        rounded = torch.cat(logprobs).clamp(min=_LOWEST).half()
        return torch.cat(ids).cpu().numpy(), rounded.cpu().numpy()

    def _file(self, length: int) -> "_TargetFile":
        if length not in self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._key}-{length}x{self._num_top}.bin"
            self._files[length] = _TargetFile(path, length, self._num_top)
        return self._files[length]


class _TargetFile:
    """Records of equal size, each with the digest of its text and a checksum, in one file that grows.

    Args:
        path: The file, which is made if it is missing.
        length: Tokens of a text, T.
        num_top: Tokens of a position, K.
    """

    def __init__(self, path: Path, length: int, num_top: int) -> None:
        self._path = path
        self._dtype = np.dtype(
            [
                ("digest", "V32"),
                ("checksum", "<u4"),
                ("ids", "<i4", (length, num_top)),
                ("logprobs", "<f2", (length, num_top + 1)),
            ]
        )
        path.touch()
        self._num_records = path.stat().st_size // self._dtype.itemsize
        # the first of equal digests is the one that later runs find, too
        digests = self._map()["digest"].tolist() if self._num_records else []
        self._places = {digest: place for place, digest in reversed(list(enumerate(digests)))}

    def read(self, digest: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Return ids and log-probabilities of a text, or None if they are not there or damaged."""
        if digest not in self._places:
            return None
        record = self._map()[self._places[digest]]
        ids, logprobs = np.array(record["ids"]), np.array(record["logprobs"])
        return (ids, logprobs) if record["checksum"] == _checksum(ids, logprobs) else None

    def append(self, digest: bytes, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Write ids and log-probabilities of a text; in the place of a damaged record if there is one."""
        record = np.zeros((), self._dtype)
        record["digest"] = np.void(digest)
        record["checksum"], record["ids"], record["logprobs"] = _checksum(ids, logprobs), ids, logprobs
        place = self._places.setdefault(digest, self._num_records)
        with self._path.open("r+b") as file:
            file.seek(place * self._dtype.itemsize)
            file.write(record.tobytes())
        self._num_records = max(self._num_records, place + 1)

    def _map(self) -> Any:
        return np.memmap(self._path, self._dtype, "r", shape=(self._num_records,))


def _checksum(ids: np.ndarray, logprobs: np.ndarray) -> int:
    return zlib.crc32(logprobs.tobytes(), zlib.crc32(ids.tobytes()))


def teacher_loss(scorer: Scorer, prepared: Prepared, targets: TeacherTargets) -> Tensor:
    """Return the mean divergence from a teacher over the tokens of a batch, in float32.

    Args:
        scorer: Scorer of the student.
        prepared: A batch of running text.
        targets: The teacher.

    Raises:
        ValueError: If the batch is to be classified.
    """
    if prepared.labels is not None:
        raise ValueError(
            "Expected a batch of running text for `teacher`, but got one with `label`; use a TextDataModule, or leave "
            "`teacher` out"
        )
    ids_BT, mask_BT = prepared.rows.input_ids, prepared.rows.attention_mask
    # before the student's forward, which holds activations
    top_BTK, logprobs_BTK1 = targets.of(ids_BT, mask_BT)
    logits_BTV = scorer.token_logits(prepared)
    losses_N = divergence(logits_BTV.flatten(0, 1), top_BTK.flatten(0, 1), logprobs_BTK1.flatten(0, 1))
    kept_N = mask_BT.flatten() != 0
    return losses_N.where(kept_N, 0.0).sum() / kept_N.sum()


def divergence(logits_NV: Tensor, ids_NK: Tensor, logprobs_NK1: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of a student from its teacher at each position, `[N]` in float32.

    Both distributions have K + 1 outcomes: the teacher's most probable tokens, and all others together. This bounds the
    divergence over the whole vocabulary from below. Renormalised over the K tokens instead, it would not see how much
    probability the student gives to all others. The student's logits may have any precision.

    Args:
        logits_NV: Logits of the student.
        ids_NK: The teacher's most probable tokens.
        logprobs_NK1: Their log-probabilities, and that of all other tokens together.
    """
    result: Tensor = _Divergence.apply(logits_NV, ids_NK, logprobs_NK1)
    return result


class _Divergence(torch.autograd.Function):
    """The divergence in chunks of positions; its gradient in closed form needs no float32 copy of the logits.

    With p the teacher's probabilities of the K + 1 outcomes and q the student's, the gradient of the logit of one of
    the K tokens is q - p. That of another token is its share of the student's probability of all others, times q - p
    of these together.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor, logprobs_NK1: Tensor) -> Tensor:
        losses, differences, rests = [], [], []
        chunks = (logits_NV.split(_CHUNK), ids_NK.split(_CHUNK), logprobs_NK1.split(_CHUNK))
        for logits, ids, teacher in zip(*chunks, strict=True):
            rest = _rest(logits, ids)
            student = torch.cat([logits.gather(1, ids).float(), rest[:, None]], 1).log_softmax(1)
            losses.append((teacher.exp() * (teacher - student)).sum(1))
            differences.append(student.exp() - teacher.exp())
            rests.append(rest)
        ctx.save_for_backward(logits_NV, ids_NK, torch.cat(differences), torch.cat(rests))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, ids_NK, differences_NK1, rests_N = ctx.saved_tensors
        scaled_NK1 = differences_NK1 * grads[0][:, None]
        grad_NV = torch.empty_like(logits_NV)
        for start in range(0, len(logits_NV), _CHUNK):
            part = slice(start, start + _CHUNK)
            shares = (logits_NV[part].float() - rests_N[part, None]).exp_().mul_(scaled_NK1[part, -1:])
            grad_NV[part] = shares.scatter_(1, ids_NK[part], scaled_NK1[part, :-1])
        return grad_NV, None, None


def _rest(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Return the logarithm of the summed exponentials of all logits but some, `[N]` in float32."""
    return logits_NV.float().scatter(1, ids_NK, -torch.inf).logsumexp(1)
