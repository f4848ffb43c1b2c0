"""Heads fitted to frozen features. They receive training features and labels, and test features without labels.

Every head gives scores: class probabilities ``(N, C)`` for single labels, one probability per label ``(N, C)`` for
several, the number ``(N, 1)`` for regression. Targets decide which: int64 ``(N,)``, bool ``(N, C)``, float64 ``(N,)``.

Letters: N clips or frames, D width of the features, C classes.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.config import ConfigError

NEIGHBOURS, TEMPERATURE = 10, 0.07  # as X-ARES
HIDDEN = 256
MLP_STEPS, MLP_BATCH, MLP_RATE = 200, 128, 3e-3
_BLOCK = 1 << 24  # similarities held at once


def require_sklearn() -> Any:
    """
    Raises:
        ConfigError: if scikit-learn is not installed, saying how to get it.
    """
    try:
        import sklearn
    except ImportError as error:
        raise ConfigError("probes need scikit-learn: pip install 'bestrq2[probe]'") from error
    return sklearn


def standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the mean and deviation of the training rows; columns that do not vary there become 0."""
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    varies = std > 1e-7 * np.abs(mean)  # below, it is float32 rounding of a constant
    scale = np.where(varies, 1 / np.where(varies, std, 1.0), 0.0).astype(train.dtype)
    mean = mean.astype(train.dtype)
    return (train - mean) * scale, (test - mean) * scale


def scores_of(
    head: str,
    train: np.ndarray,
    targets: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    strength: float,
    seed: int = 0,
    parts: int = 1,
) -> np.ndarray:
    """Fit ``head`` to standardised features and score the test rows.

    Args:
        train, test: ``(N, D)``; with ``parts``, that many layers of equal width one after the other.
        targets: of the training rows; classes that have none get the score 0.
        strength: inverse of the L2 penalty: the loss summed over N rows, plus ``|w|^2 / (2 strength)``; of "ridge" see
            :func:`ridge_scores`.

    Returns:
        ``(N_test, C)`` float64, or ``(N_test, 1)``.
    """
    if targets.ndim == 1 and targets.dtype.kind != "f" and len(np.unique(targets)) == 1:
        return np.eye(num_classes)[np.full(len(test), targets[0])]
    if parts > 1:
        return weighted_layers(train, targets, test, num_classes, strength, parts)[0]
    if head == "knn":
        return _neighbours(train, targets, test, num_classes)
    if head == "mlp":
        return _mlp(train, targets, test, num_classes, strength, seed)
    if head == "ridge":
        return ridge_scores(train, targets, test, num_classes, (strength,))[0]
    if targets.ndim == 2:
        return _sigmoids(train, targets, test, strength)
    if targets.dtype.kind == "f":
        from sklearn.linear_model import Ridge

        return Ridge(alpha=1 / strength).fit(train, targets).predict(test)[:, None]
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if train.shape[1] > len(train):
        train, test = _in_row_space(train, test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 2000 iterations are enough for a probe
        model = LogisticRegression(C=strength, max_iter=2000).fit(train, targets)
    scores = np.zeros((len(test), num_classes))
    scores[:, model.classes_] = model.predict_proba(test)
    return scores


def ridge_scores(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, num_classes: int, strengths: Sequence[float]
) -> list[np.ndarray]:
    """Least squares with an L2 penalty on membership of 0 or 1 in every class, or on the number: one matrix of scores
    ``(N_test, C)`` or ``(N_test, 1)`` for each of ``strengths``, all from one eigendecomposition.

    Rows of a single label weigh as if every class had as many (mean weight 1), because balanced accuracy is asked for.
    The penalty is ``t |w|^2 / strength`` beside the sum of weighted squares over N rows, with t the mean squared norm
    of a row: so one strength means the same for any width. Membership of a single label is shifted and scaled to
    probabilities, which keeps the order of a row's classes; of several labels it may leave 0..1.

    Args:
        train, test: ``(N, D)``.
        targets: of the training rows.
    """
    single = targets.ndim == 1 and targets.dtype.kind != "f"
    values = np.eye(num_classes)[targets] if single else targets.reshape(len(targets), -1).astype(np.float64)
    weights = 1 / values.sum(0)[targets] if single else np.ones(len(targets))
    weights /= weights.mean()
    root = np.sqrt(weights)[:, None]
    mean, centre = np.average(values, 0, weights), np.average(train, 0, weights)
    known, asked, wanted = root * (train - centre), test - centre, root * (values - mean)
    wide = known.shape[1] > len(known)
    gram = known @ known.T if wide else known.T @ known
    size = float(np.trace(gram)) / len(known) or 1.0
    eigenvalues, basis = np.linalg.eigh(gram)
    inner = basis.T @ (wanted if wide else known.T @ wanted)
    asked = (asked @ known.T if wide else asked) @ basis
    found = []
    for strength in strengths:
        scores = (asked / (np.maximum(eigenvalues, 0) + size / strength)) @ inner + mean
        if single:
            present = mean > 0
            scores[:, present] -= np.minimum(scores[:, present].min(1, keepdims=True), 0)
            scores = np.where(present, scores / scores[:, present].sum(1, keepdims=True), 0.0)
        found.append(scores)
    return found


def _in_row_space(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of both in an orthonormal basis of the training rows, ``(N, N)`` and ``(N_test, N)`` instead of D.

    The weights of a head with an L2 penalty are a combination of training rows (representer theorem), so its scores are
    the same, and N columns are cheaper than D.
    """
    basis = np.linalg.qr(train.T)[0]
    return train @ basis, test @ basis


def _neighbours(train: np.ndarray, targets: np.ndarray, test: np.ndarray, num_classes: int) -> np.ndarray:
    """The 10 nearest training rows, weighted by exp(cosine / 0.07). Rows that are equally near at the tenth place share
    what is left of the ten, so that the order of the rows does not matter."""
    if targets.ndim == 2:
        values = targets.astype(np.float64)
    else:
        values = targets[:, None] if targets.dtype.kind == "f" else np.eye(num_classes)[targets]

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    known, asked = unit(train), unit(test)
    scores = np.zeros((len(test), values.shape[1]))
    count, rows = min(NEIGHBOURS, len(train)), max(1, _BLOCK // len(train))
    for start in range(0, len(test), rows):
        cosine = asked[start : start + rows] @ known.T
        nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        weight = np.exp((np.take_along_axis(cosine, nearest, 1) - 1) / TEMPERATURE)
        found = (weight[..., None] * values[nearest]).sum(1) / weight.sum(1, keepdims=True)
        last = np.take_along_axis(cosine, nearest[:, -1:], 1)  # the least of them: argpartition puts it there
        rounding = 64 * np.finfo(cosine.dtype).eps
        for row in np.flatnonzero((cosine >= last - rounding).sum(1) > count):
            similar = cosine[row]
            nearer, equal = similar > last[row] + rounding, np.abs(similar - last[row]) <= rounding
            share = nearer + equal * ((count - nearer.sum()) / equal.sum())
            spread = share * np.exp((similar - 1) / TEMPERATURE)
            found[row] = spread @ values / spread.sum()
        scores[start : start + rows] = found
    return scores


def weighted_layers(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, num_classes: int, strength: float, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """A linear head on a learned mixture of layers: ``(sum_l w_l x_l) W + b`` with ``w = softmax(a)``, by L-BFGS.

    The penalty is on W alone, as for the other linear heads. The objective is not convex; it starts at equal weights.

    Args:
        train, test: ``(N, parts * D)``, one layer after the other.

    Returns:
        scores as :func:`scores_of`, and the weights ``(parts,)``.
    """
    x = torch.from_numpy(np.ascontiguousarray(train)).unflatten(1, (parts, -1))
    asked = torch.from_numpy(np.ascontiguousarray(test)).unflatten(1, (parts, -1))
    single = targets.ndim == 1 and targets.dtype.kind != "f"
    values, mean, scale, _ = _outputs(targets, num_classes)
    y = torch.from_numpy(values).to(x.dtype)
    mixture = torch.zeros(parts, dtype=x.dtype, requires_grad=True)
    weight = torch.zeros(x.shape[2], y.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [mixture, weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def outputs(rows: Tensor) -> Tensor:
        return torch.einsum("l,nld->nd", mixture.softmax(0), rows) @ weight + bias

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = outputs(x)
        if single:
            loss = -(found.log_softmax(1) * y).sum()
        elif targets.ndim == 2:
            loss = nn.functional.binary_cross_entropy_with_logits(found, y, reduction="sum")
        else:
            loss = (found - y).square().sum() / 2
        loss = (loss + weight.square().sum() / (2 * strength)) / len(x)
        loss.backward()
        return loss

    # At W = 0 the mixture has no gradient: the first steps move W, the following ones both.
    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        scores = outputs(asked)
        scores = scores.softmax(1) if single else scores.sigmoid() if targets.ndim == 2 else scores * scale + mean
    return scores.double().numpy(), mixture.detach().softmax(0).double().numpy()


def _sigmoids(train: np.ndarray, targets: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    """Logistic regression for every label at once: their objectives share nothing, so one L-BFGS minimises the sum."""
    x, y = torch.from_numpy(np.ascontiguousarray(train)), torch.from_numpy(targets.astype(train.dtype))
    share = targets.mean(0)
    mixed = (share > 0) & (share < 1)
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, requires_grad=True)
    share = share.clip(1e-6, 1 - 1e-6)
    bias = torch.tensor(np.log(share / (1 - share)), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    columns = torch.from_numpy(mixed)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = (x @ weight + bias)[:, columns]
        # Divided by N, so that the tolerance means the same for any amount of data.
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y[:, columns], reduction="sum")
        loss = (loss + weight[:, columns].square().sum() / (2 * strength)) / len(x)
        loss.backward()
        return loss

    if mixed.any():
        with torch.enable_grad():
            optimizer.step(closure)
    with torch.no_grad():
        scores = torch.sigmoid(torch.from_numpy(test) @ weight + bias).double().numpy()
    scores[:, ~mixed] = share[~mixed].round()
    return scores


def _mlp(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, num_classes: int, strength: float, seed: int
) -> np.ndarray:
    """One hidden layer of 256 ReLUs by Adam with a cosine schedule: 200 steps of 128 rows, or 3 passes if more.

    The gradient of every loss here (cross-entropy, its binary form, half the squared error) with respect to the output
    is the prediction minus the target, so it is written out.
    """
    generator = np.random.default_rng(seed)
    x = np.ascontiguousarray(train, dtype=np.float32)
    y, mean, scale, link = _outputs(targets, num_classes)
    batch = min(MLP_BATCH, len(x))
    steps = max(MLP_STEPS, 3 * len(x) // batch)
    shapes = [(x.shape[1], HIDDEN), (HIDDEN,), (HIDDEN, y.shape[1]), (y.shape[1],)]
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    flat = np.zeros(ends[-1], dtype=np.float32)
    gradient, first, second = np.zeros_like(flat), np.zeros_like(flat), np.zeros_like(flat)

    def views(vector: np.ndarray) -> list[np.ndarray]:
        return [vector[a:b].reshape(shape) for a, b, shape in zip(ends, ends[1:], shapes)]

    w1, b1, w2, b2 = views(flat)
    g1, gb1, g2, gb2 = views(gradient)
    for weight in (w1, w2):
        weight[...] = generator.uniform(-1, 1, weight.shape) / len(weight) ** 0.5
    decay = np.float32(1 / (strength * len(x)))
    order = np.zeros(0, dtype=np.int64)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = np.concatenate((order, generator.permutation(len(x))))
        chosen, order = order[:batch], order[batch:]
        rows = x[chosen]
        hidden = np.maximum(rows @ w1 + b1, 0)
        error = (link(hidden @ w2 + b2) - y[chosen]) / batch
        back = (error @ w2.T) * (hidden > 0)
        g1[...], gb1[...] = rows.T @ back + decay * w1, back.sum(0)
        g2[...], gb2[...] = hidden.T @ error + decay * w2, error.sum(0)
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient * gradient - second)
        rate = MLP_RATE * (1 + np.cos(np.pi * (step - 1) / steps)) / 2 / (1 - 0.9**step)
        flat -= np.float32(rate) * first / (np.sqrt(second / np.float32(1 - 0.999**step)) + 1e-8)
    output = link(np.maximum(np.ascontiguousarray(test, dtype=np.float32) @ w1 + b1, 0) @ w2 + b2)
    return output.astype(np.float64) * scale + mean


def _outputs(targets: np.ndarray, num_classes: int) -> tuple[np.ndarray, float, float, Callable[..., np.ndarray]]:
    """Targets as float32 ``(N, C)``, their mean and scale, and what turns outputs into predictions of them."""
    if targets.dtype.kind == "f":
        mean, scale = float(targets.mean()), float(targets.std()) or 1.0
        return ((targets - mean) / scale).astype(np.float32)[:, None], mean, scale, np.asarray
    if targets.ndim == 2:
        return targets.astype(np.float32), 0.0, 1.0, lambda x: 1 / (1 + np.exp(-np.clip(x, -60, 60)))

    def softmax(x: np.ndarray) -> np.ndarray:
        grown = np.exp(x - x.max(1, keepdims=True))
        return grown / grown.sum(1, keepdims=True)

    return np.eye(num_classes, dtype=np.float32)[targets], 0.0, 1.0, softmax
