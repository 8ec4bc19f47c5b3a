"""Function classes of a token's own vector, fitted to the updates of a layer.

Each class predicts a token's update Δ = y - x (y: what the layer gives) from the token's own input
x alone. All classes contain the identity (Δ = 0). `ridge` pulls those that have more numbers to fit
than tokens towards it (or towards the mean update b); it is relative to the sizes of the inputs, so
that a change of scale changes nothing:

    identity    0
    scalar      a x
    diagonal    a ⊙ x
    orthogonal  Q x - x
    low-rank    b + B x, with B of rank r (reduced-rank ridge regression)
    affine      b + B x (ridge regression)
    mlp         b + B₂ gelu(B₁ x + b₁)

A fit is batched: [batch, n, hidden] tokens and their updates give predictions for [batch, m,
hidden] queries. A local fit is a batch of neighbourhoods with one query each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

CLASSES = ("identity", "scalar", "diagonal", "orthogonal", "low-rank", "affine", "mlp")
"""The function classes; each reads only the token's own vector."""
FOLDS = 5  # of documents, for global fits (our reading)
_ENTRIES = 2**19  # of the largest tensor of a batch of neighbourhoods
_WIDTH, _STEPS, _BATCH, _RATE, _DECAY = 128, 200, 128, 3e-3, 0.1  # of the MLP (our reading)


def local_updates(
    inputs: torch.Tensor,
    updates: torch.Tensor,
    near: torch.Tensor,
    classes: Sequence[str],
    ridge: float,
    rank: int,
) -> dict[str, torch.Tensor]:
    """Each token's predicted update [tokens, hidden], from a map fitted on its neighbours.

    inputs, updates: [tokens, hidden]; near: [tokens, k], the neighbours' places.
    """
    step = max(1, _ENTRIES // (near.shape[1] * inputs.shape[1]))
    parts = [
        fitted(inputs[some], updates[some], queries[:, None], classes, ridge, rank)
        for some, queries in zip(near.split(step), inputs.split(step), strict=True)
    ]
    return {name: torch.cat([part[name][:, 0] for part in parts]) for name in classes}


def global_updates(
    inputs: torch.Tensor,
    updates: torch.Tensor,
    documents: torch.Tensor,
    first: torch.Tensor,
    classes: Sequence[str],
    ridge: float,
    rank: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Each token's predicted update [tokens, hidden], from one map fitted on other documents.

    The documents are dealt into folds; a fold is predicted by maps fitted on the others.
    first: [tokens], whether it is its document's first token. These take no part in the fits of
    other tokens; they themselves are predicted by a map fitted on all tokens.
    """
    found = {name: torch.zeros_like(updates) for name in classes}
    fold = documents % FOLDS
    for number in fold.unique():
        for queries, pool in (
            ((fold == number) & ~first, (fold != number) & ~first),
            ((fold == number) & first, fold != number),
        ):
            fit = inputs[pool][None], updates[pool][None], inputs[queries][None]
            for name, predicted in fitted(*fit, classes, ridge, rank, seed).items():
                found[name][queries] = predicted[0]
    return found


def nearest_tokens(
    inputs: torch.Tensor, documents: torch.Tensor, first: torch.Tensor, count: int
) -> torch.Tensor:
    """The `count` nearest tokens of other documents, [tokens, count], nearest first.

    Euclidean. A token that is not its document's first has no first tokens as neighbours: their
    vectors are unlike all others in many models.
    """
    wide = inputs.double()  # squares of massive activations would drown small distances
    squares = wide.square().sum(-1)
    found = []
    for some in torch.arange(len(wide), device=wide.device).split(1024):
        far = squares[some, None] + squares - 2 * wide[some] @ wide.T
        barred = documents[some, None] == documents
        barred |= first & ~first[some, None]
        found.append(far.masked_fill_(barred, torch.inf).topk(count, largest=False).indices)
    return torch.cat(found)


def fitted(
    inputs: torch.Tensor,
    updates: torch.Tensor,
    queries: torch.Tensor,
    classes: Sequence[str],
    ridge: float,
    rank: int,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Predicted updates [batch, m, hidden] by class; see the module.

    >>> x = torch.randn(1, 9, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    >>> found = fitted(x, 2 * x, x, ["scalar", "orthogonal"], 0.0, 1)
    >>> torch.allclose(found["scalar"], 2 * x), torch.allclose(found["orthogonal"], 0 * x)
    (True, True)
    """
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "identity": lambda: torch.zeros_like(queries),
        "scalar": lambda: _scaled(inputs, updates, queries, (1, 2)),
        "diagonal": lambda: _scaled(inputs, updates, queries, (1,)),
        "orthogonal": lambda: _rotated(inputs, updates, queries, ridge),
        "mlp": lambda: _mlp(inputs, updates, queries, seed),
    }
    found = {name: makers[name]() for name in classes if name in makers}
    if {"low-rank", "affine"} & set(classes):
        found["affine"], found["low-rank"] = _linear(
            inputs, updates, queries, ridge, rank if "low-rank" in classes else None
        )
    return {name: found[name] for name in classes}


def _scaled(
    inputs: torch.Tensor, updates: torch.Tensor, queries: torch.Tensor, over: tuple[int, ...]
) -> torch.Tensor:
    """Least squares for one factor, or one per dimension."""
    sizes = inputs.square().sum(over, keepdim=True)
    factors = (inputs * updates).sum(over, keepdim=True) / sizes.clamp(min=_tiny(inputs))
    return queries * factors


def _linear(
    inputs: torch.Tensor,
    updates: torch.Tensor,
    queries: torch.Tensor,
    ridge: float,
    rank: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression on standardised inputs, whole and cut to a rank (or whole again).

    Cut where the ridge objective itself is least under the rank: on the leading right singular
    vectors of the fitted values, those of the ridge's own rows among them. With fewer tokens than
    dimensions all is done on the tokens' [n, n] products.
    """
    middle, centre = inputs.mean(1, keepdim=True), updates.mean(1, keepdim=True)
    x, moved, asked = inputs - middle, updates - centre, queries - middle
    spread = x.square().mean(1, keepdim=True).sqrt()
    # A dimension that is the same for all but for rounding, as of equal tokens, tells nothing.
    rounding = 16 * torch.finfo(x.dtype).eps * inputs.abs().amax(1, keepdim=True)
    x = x.masked_fill(spread <= rounding, 0)
    spread = spread.masked_fill(spread <= rounding, 1)
    x, asked = x / spread, asked / spread
    few = x.shape[1] <= x.shape[2]
    gram = x @ x.mT if few else x.mT @ x
    extra = _strength(gram.diagonal(dim1=-2, dim2=-1).mean(-1), ridge)
    chol = torch.linalg.cholesky(gram + extra * _eye(gram))
    if few:
        whole = torch.cholesky_solve(x @ asked.mT, chol).mT @ moved
    else:
        cross = x.mT @ moved
        solved = torch.cholesky_solve(cross, chol)
        whole = asked @ solved
    if rank is None or rank >= min(x.shape[1] - 1, x.shape[2]):
        return whole + centre, whole + centre
    if few:
        # The fitted energy is moved' S moved with S = gram (gram + extra)^-1 = root root'.
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0)
        root = vectors * (values / (values + extra[..., 0])).sqrt()[:, None]
        energy, leading = torch.linalg.eigh(root.mT @ (moved @ moved.mT) @ root)
        energy, leading = energy[:, None, -rank:], leading[..., -rank:]
        held = energy > torch.finfo(x.dtype).eps ** 0.5 * energy[..., -1:]
        size = energy.masked_fill(~held, 1).sqrt()
        frame = moved.mT @ (root @ (leading * held / size))
    else:
        frame = torch.linalg.eigh(cross.mT @ solved)[1][..., -rank:]
    return whole + centre, whole @ frame @ frame.mT + centre


def _rotated(
    inputs: torch.Tensor, updates: torch.Tensor, queries: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Procrustes: the rotation that brings inputs nearest to outputs, pulled to the identity.

    What neither inputs nor outputs span stays as it is, so the work is done in their span.
    """
    outputs = inputs + updates
    extra = _strength(inputs.square().sum((1, 2)) / inputs.shape[2], ridge)
    if 2 * inputs.shape[1] < inputs.shape[2]:
        frame = torch.linalg.qr(torch.cat((inputs, outputs), 1).mT)[0]
        inputs, outputs, asked = inputs @ frame, outputs @ frame, queries @ frame
    else:
        frame, asked = None, queries
    cross = inputs.mT @ outputs
    left, _, right = torch.linalg.svd(cross + extra * _eye(cross))
    moved = asked @ (left @ right) - asked
    return moved if frame is None else moved @ frame.mT


def _mlp(
    inputs: torch.Tensor, updates: torch.Tensor, queries: torch.Tensor, seed: int
) -> torch.Tensor:
    """One hidden layer, trained by AdamW for a fixed number of steps; one fit for each of batch."""
    return torch.stack([_one_mlp(*one, seed) for one in zip(inputs, updates, queries, strict=True)])


@torch.enable_grad()
def _one_mlp(
    inputs: torch.Tensor, updates: torch.Tensor, queries: torch.Tensor, seed: int
) -> torch.Tensor:
    centre, middle = updates.mean(0), inputs.mean(0)
    spread = (inputs - middle).square().mean(0).sqrt().clamp(min=_tiny(inputs))
    size = (updates - centre).square().mean().sqrt().clamp(min=_tiny(inputs))
    x, goal = (inputs - middle) / spread, (updates - centre) / size
    # Drawn on the CPU, by a generator of its own: the global one is left as it is.
    draw = torch.Generator().manual_seed(seed)
    width, hidden = _WIDTH, x.shape[1]
    first = torch.randn(hidden, width, generator=draw).to(x) / hidden**0.5
    parts = [first, x.new_zeros(width), x.new_zeros(width, hidden), x.new_zeros(hidden)]
    parts = [part.requires_grad_() for part in parts]

    def mapped(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ parts[0] + parts[1]) @ parts[2] + parts[3]

    optimizer = torch.optim.AdamW(parts, lr=_RATE, weight_decay=_DECAY)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        some = torch.randint(len(x), (min(_BATCH, len(x)),), generator=draw).to(x.device)
        loss = (mapped(x[some]) - goal[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return mapped((queries - middle) / spread) * size + centre


def _strength(size: torch.Tensor, ridge: float) -> torch.Tensor:
    """What is added to a diagonal of mean size [batch]: `ridge` times it, and never nothing."""
    least = torch.finfo(size.dtype).eps ** 0.75
    return (max(ridge, least) * size).clamp(min=_tiny(size))[:, None, None]


def _eye(square: torch.Tensor) -> torch.Tensor:
    return torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)


def _tiny(like: torch.Tensor) -> float:
    """Below every square that counts, so that nothing is divided by 0."""
    return float(torch.finfo(like.dtype).tiny)
