"""Log-probs under a linear head, tile by tile: logits [N, V] never exist, forward or backward.

A tile is some rows by one block of the vocabulary. Each tile is made into its own softmax, and remembers one
number a row, its log-normalizer. From those of all blocks come the row's log-normalizer and the share that
each block has in it. With `g` the gradient of the log-probs, `G[u]` its sum over row u's entries, and
`softmax = share * softmax within the tile`,

    d loss / d logits[u, v] = sum of g[n] over u's entries with target v  -  G[u] * softmax[u, v]

The backward pass computes a tile's logits again and puts `-G * share`, which is one number a row, into the
small factors of the two products; so the tile itself is passed over only once more, by the softmax. The first
term touches one logit an entry and is added by itself. A block's weight gradient is complete, and written
once, before the next block begins. Where the entropy H[u] has a gradient `h[u]`, too, the second term is

    softmax[u, v] * (-G[u] - h[u] * (log softmax[u, v] + H[u]))

which is no number a row, so that the tile is passed over twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.errors import DataError
from trainer.model.lm_head.logit_transform import LogitTransform
from trainer.model.lm_head.selected_logprobs import add_rows


class HeadScores(NamedTuple):
    """N targets, predicted from U rows, in nats. Float32, or float64 where the model computes in it."""

    logprobs: Tensor
    """[N], with gradient."""
    entropy: Tensor
    """[U]: of each row's distribution, with gradient."""


class TileSize(NamedTuple):
    """Largest size of a tile."""

    rows: int
    vocabulary: int


TILES = {"cpu": TileSize(512, 4096), "cuda": TileSize(4096, 8192)}
"""By device type. On a CPU the products are at full speed from about 512 rows and 2,048 tokens on, and a
tile's float32 logits and softmax should stay in the cache between the passes over them: 8 MiB each here.
Measured alike up to twice that, slower beyond. A GPU needs a tile large enough to fill it."""


def tiled_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    transform: LogitTransform | None = None,
    tile: TileSize | None = None,
) -> HeadScores:
    """Score targets under `transform(hidden @ weight.T + bias) / temperature`.

    Products take the autocast type where autocast is on, else the weight's; everything else is float32, or
    float64 for a float64 weight. Equal inputs give equal bits.

    Args:
        hidden: [U, H].
        weight: [V, H]; gets no gradient computed if it needs none.
        bias: [V], or None.
        rows: [N] int64, in [0, U): which row predicts a target. Several entries may share a row.
        targets: [N] int64, in [0, V).
        temperature: [U], or None for 1.
        transform: What the model does to the head's output. None: nothing.
        tile: None: that of `TILES` for the device.

    Raises:
        DataError: A target is outside the vocabulary.
    """
    tile = tile or TILES.get(hidden.device.type, TILES["cuda"])
    transform = transform or LogitTransform()
    entries = _sort_entries(rows, targets, tile, len(hidden), len(weight))
    # torch declares no types for Function.apply.
    scores = _TiledScores.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, temperature, _Task(transform, entries, tile)
    )
    return HeadScores(*scores)


@dataclass(frozen=True)
class _Entries:
    """The entries, those of one tile side by side, tiles in the order in which they are walked."""

    rows: Tensor  # [N]
    targets: Tensor  # [N]
    place: Tensor  # [N]: where each of the caller's entries went
    bounds: list[int]  # [tiles + 1]


@dataclass(frozen=True)
class _Task:
    transform: LogitTransform
    entries: _Entries
    tile: TileSize


def _sort_entries(rows: Tensor, targets: Tensor, tile: TileSize, row_count: int, vocabulary: int) -> _Entries:
    row_tiles, blocks = -(-row_count // tile.rows), -(-vocabulary // tile.vocabulary)
    number = targets // tile.vocabulary * row_tiles + rows // tile.rows  # [N]
    number, order = number.sort(stable=True)
    bounds = torch.searchsorted(number, torch.arange(row_tiles * blocks + 1, device=rows.device))
    if len(targets) and (outside := (targets < 0) | (targets >= vocabulary)).any():
        raise DataError(
            f"token {int(targets[outside][0])} is outside the head's vocabulary of {vocabulary}: environment "
            "and trainer use different tokenizers or models"
        )
    return _Entries(rows[order], targets[order], order.argsort(), bounds.tolist())


def _spans(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _TiledScores(torch.autograd.Function):
    """The computation itself; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, task: _Task
    ) -> tuple[Tensor, Tensor]:
        compute = _compute_dtype(weight)
        walk = _Walk(hidden.detach().to(compute), weight, bias, temperature, task, compute)
        with torch.autocast(hidden.device.type, enabled=False):
            result = walk.forward()
        ctx.walk_of = (task, compute, hidden.dtype)
        ctx.save_for_backward(walk.hidden, weight, bias, temperature, *result)
        rows, place = task.entries.rows, task.entries.place
        logprobs = (result.picked - result.normalizer[rows])[place]
        ctx.set_materialize_grads(False)
        return logprobs, result.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None, entropy_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if gradient is None and entropy_gradient is None:
            return None, None, None, None, None
        task, compute, hidden_dtype = ctx.walk_of
        hidden, weight, bias, temperature, *state = ctx.saved_tensors
        result = _Forward(*state)
        walk = _Walk(hidden, weight, bias, temperature, task, compute)
        if gradient is None:
            gradient = torch.zeros_like(result.picked)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = walk.backward(gradient, entropy_gradient, result, wanted=ctx.needs_input_grad[:3])
        grad_hidden, grad_weight, grad_bias = grads
        return (
            None if grad_hidden is None else grad_hidden.to(hidden_dtype),
            grad_weight,
            grad_bias,
            None,
            None,
        )


class _Forward(NamedTuple):
    picked: Tensor  # [N] logits of the targets, in the order of the tiles
    tile_normalizers: Tensor  # [blocks, U]
    normalizer: Tensor  # [U]
    entropy: Tensor  # [U]


class _Bend(NamedTuple):
    """A logit's gradient as a multiple of its softmax: `constant - slope * log softmax`."""

    constant: Tensor  # [U, 1]
    slope: Tensor  # [U, 1]
    normalizer: Tensor  # [U, 1]


class _Walk:
    """Both passes over the tiles: vocabulary blocks outside, row tiles inside."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: Tensor | None,
        task: _Task,
        compute: torch.dtype,
    ) -> None:
        self.hidden = hidden
        self._weight, self._bias, self._compute = weight, bias, compute
        self._precision = torch.float64 if compute == torch.float64 else torch.float32
        self._cap = task.transform.cap
        self._entries, self._tile = task.entries, task.tile
        self._blocks = list(_spans(len(weight), task.tile.vocabulary))
        self._row_spans = list(_spans(len(hidden), task.tile.rows))
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._factor: Tensor | None = None  # [U, 1]: the derivative of an uncapped logit
        if temperature is not None or task.transform.scale != 1.0 or self._cap is not None:
            row_temperature = self.hidden.new_ones(len(hidden)) if temperature is None else temperature
            self._factor = (task.transform.scale / row_temperature.to(self._precision))[:, None]
            self._squeeze = task.transform.scale / (self._cap or 1.0)

    def forward(self) -> _Forward:
        shape = (len(self._blocks), len(self.hidden))
        normalizers = self._new(*shape)
        entropies = self._new(*shape)  # of a tile's own softmax
        picked = self._new(len(self._entries.targets))
        for index, block in enumerate(self._blocks):
            weight = self._cast("weight", self._weight[block], self._compute)
            for row_index, span in enumerate(self._row_spans):
                logits = self._logits(self.hidden[span], weight, block, span)
                logits = self._cast("logits", logits, self._precision)
                softmax = torch.softmax(
                    logits, dim=1, out=self._buffer("softmax", logits.shape, logits.dtype)
                )
                # The likeliest token's probability is exp(its logit - the normalizer).
                normalizers[index, span] = logits.amax(dim=1) - softmax.amax(dim=1).log_()
                entries = self._entries_of(index, row_index)
                rows, targets = self._entries.rows[entries], self._entries.targets[entries]
                picked[entries] = logits[rows - span.start, targets - block.start]
                logits.sub_(normalizers[index, span, None])
                entropies[index, span] = softmax.mul_(logits).sum(dim=1).neg_()
        normalizer = normalizers.logsumexp(dim=0)
        log_share = normalizers - normalizer  # [blocks, U]
        entropy = (log_share.exp() * (entropies - log_share)).sum(dim=0)
        return _Forward(picked, normalizers, normalizer, entropy)

    def backward(
        self,
        gradient: Tensor,
        entropy_gradient: Tensor | None,
        result: _Forward,
        *,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states [U, H] (float32), weight [V, H] and bias [V]."""
        order_gradient = torch.empty_like(gradient)
        order_gradient[self._entries.place] = gradient
        row_gradient = self._new(len(self.hidden)).zero_()
        add_rows(row_gradient, self._entries.rows, order_gradient)
        coefficient = row_gradient[:, None].neg_()  # [U, 1]
        bend: _Bend | None = None
        if entropy_gradient is not None:
            slope = entropy_gradient[:, None]
            bend = _Bend(coefficient - slope * result.entropy[:, None], slope, result.normalizer[:, None])
            coefficient = torch.ones_like(coefficient)
        entry = order_gradient[:, None]  # [N, 1]
        if self._factor is not None:
            coefficient = coefficient * self._factor
            entry = entry * self._factor[self._entries.rows]
            if self._cap is not None:
                entry = entry * (
                    1 - self._tanh(result.picked[:, None], self._factor[self._entries.rows]).square_()
                )
        grad_hidden = self._new(*self.hidden.shape).zero_() if wanted[0] else None
        grad_weight = torch.empty_like(self._weight) if wanted[1] else None
        grad_bias = torch.empty_like(self._bias) if self._bias is not None and wanted[2] else None
        for index, block in enumerate(self._blocks):
            weight = self._cast("weight", self._weight[block], self._compute)
            block_weight = self._block_gradient(grad_weight, block)
            block_bias = self._block_gradient(grad_bias, block)
            share = (result.tile_normalizers[index] - result.normalizer).exp_()[:, None]
            for span in self._row_spans:
                slope = self._slope(self.hidden[span], weight, block, span, bend)
                factor = coefficient[span] * share[span]
                if grad_hidden is not None:
                    grad_hidden[span].addcmul_(self._product("rows", slope, weight), factor)
                if block_weight is not None:
                    rows = (self.hidden[span] * factor).to(self._compute)
                    block_weight.add_(self._product("gradient", slope.t(), rows))
                if block_bias is not None:
                    block_bias.add_((slope * factor).sum(dim=0))
            entries = slice(self._entries_of(index, 0).start, self._entries_of(index, -1).stop)
            rows, columns = self._entries.rows[entries], self._entries.targets[entries] - block.start
            if grad_hidden is not None:
                add_rows(grad_hidden, rows, weight[columns] * entry[entries])
            if block_weight is not None and grad_weight is not None:
                add_rows(block_weight, columns, self.hidden[rows] * entry[entries])
                _store(grad_weight[block], block_weight)
            if block_bias is not None and grad_bias is not None:
                add_rows(block_bias, columns, entry[entries, 0])
                _store(grad_bias[block], block_bias)
        return grad_hidden, grad_weight, grad_bias

    def _logits(self, hidden: Tensor, weight: Tensor, block: slice, span: slice) -> Tensor:
        """Logits of a tile, in the products' own type if nothing is done to them."""
        logits = self._product("product", hidden, weight.t())
        if self._bias is None and self._factor is None:
            return logits
        logits = self._cast("logits", logits, self._precision)
        if self._bias is not None:
            logits.add_(self._bias[block])
        if self._factor is None:
            return logits
        if self._cap is None:
            return logits.mul_(self._factor[span])
        return logits.mul_(self._squeeze).tanh_().mul_(self._factor[span] / self._squeeze)

    def _slope(self, hidden: Tensor, weight: Tensor, block: slice, span: slice, bend: _Bend | None) -> Tensor:
        """The softmax within a tile, times the soft cap's derivative, in the products' type.

        With `bend`, times what the log-probs' and the entropy's gradients make of each logit.
        """
        logits = self._logits(hidden, weight, block, span)
        if bend is not None:  # log-probs are needed, of more than the products' precision
            logits = self._cast("logits", logits, self._precision)
        slope = torch.softmax(logits, dim=1, out=self._buffer("softmax", logits.shape, logits.dtype))
        if self._cap is not None and self._factor is not None:
            slope.addcmul_(slope, self._tanh(logits, self._factor[span]).square_(), value=-1)
        if bend is not None:
            logprobs = logits.sub_(bend.normalizer[span])
            slope.mul_(logprobs.mul_(-bend.slope[span]).add_(bend.constant[span]))
        return self._cast("slope", slope, self._compute)

    def _tanh(self, logits: Tensor, factor: Tensor) -> Tensor:
        """The hyperbolic tangent that made these soft-capped logits; overwrites nothing."""
        return logits * (self._squeeze / factor)

    def _entries_of(self, block_index: int, row_index: int) -> slice:
        """Where the entries of a tile lie; a negative row index counts from the end."""
        number = block_index * len(self._row_spans) + row_index % max(1, len(self._row_spans))
        return slice(*self._entries.bounds[number : number + 2])

    def _block_gradient(self, whole: Tensor | None, block: slice) -> Tensor | None:
        """Zeros to add up a block's gradient in: the block itself, unless its type is too coarse."""
        if whole is None:
            return None
        if whole.dtype == self._precision:
            return whole[block].zero_()
        return torch.zeros_like(whole[block], dtype=self._precision)

    def _product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Matrix product, accumulated in float32 and left in it where the device's kernels can."""
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(left, right, out_dtype=torch.float32)
        shape = torch.Size((left.shape[0], right.shape[1]))
        return torch.mm(left, right, out=self._buffer(name, shape, left.dtype))

    def _cast(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        if values.dtype == dtype:
            return values
        return self._buffer(name, values.shape, dtype).copy_(values)

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for one tile's values, the same for every tile: fresh pages cost more than they hold."""
        flat = self._buffers.get((name, dtype))
        if flat is None or flat.numel() < shape.numel():
            flat = torch.empty(shape.numel(), dtype=dtype, device=self.hidden.device)
            self._buffers[name, dtype] = flat
        return flat[: shape.numel()].view(shape)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._precision, device=self.hidden.device)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The type in which the model's own head would multiply."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _store(into: Tensor, values: Tensor) -> None:
    if into.data_ptr() != values.data_ptr():
        into.copy_(values)
