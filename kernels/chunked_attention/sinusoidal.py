"""What the kernels of ``ops.chunked_attention_sinusoidal`` share: the position term as an inner product of features.

With a_k = 2 pi k / P, the position term of query i and key j is, over the frequencies of a Fourier series of period P,

    sum_k C_k(i) cos(a_k (i - j)) + S_k(i) sin(a_k (i - j))  =  sum_k f_k(i) cos(a_k j) + g_k(i) sin(a_k j)
    f_k(i) = C_k(i) cos(a_k i) + S_k(i) sin(a_k i)              C, S = (q_i + position_bias) @ onto
    g_k(i) = C_k(i) sin(a_k i) - S_k(i) cos(a_k i)              (its own inverse: C, S = the same of f, g)

So the features f, g belong to a query alone and the basis to a key alone, one row per j mod P for all heads and items:

                          basis (P, 2 NB BK), in the L2
                          cos block 0 | ... | sin block 0 | ...       rows j mod P of the key tile
    f, g of BM queries    ----------------- dot ---------------->     added to the [BM, BN] scores

Frequencies come in NB blocks of BK; behind the last one the series' rows of ``onto`` and ``basis`` are zero. Tuples
hold one pair of tensors a block: (f_0, g_0, f_1, g_1, ...).
"""

import triton
import triton.language as tl

RUNTIME = ["B", "H", "Tq", "Tk", "chunk", "left", "right", "offset", "period", "rows"]


@triton.jit
def block_pointers(ptr, i_row, i_block, ROWS: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr):
    """Rows from ``i_row`` of block ``i_block``, or of sines from NB on, in a (rows, 2 NB BK) table: [ROWS, BK].

    One scalar and constant offsets: pointers of their own for every row would take the registers of the features.
    """
    o_row, o_k = tl.arange(0, ROWS), tl.arange(0, BK)
    return ptr + (i_row * (2 * NB) + i_block) * BK + (o_row[:, None] * (2 * NB * BK) + o_k[None, :])


@triton.jit
def load_block(ptr, i_row, i_block, ROWS: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr):
    return tl.load(block_pointers(ptr, i_row, i_block, ROWS, NB, BK))


@triton.jit
def load_onto(onto_ptr, i_block, d, BD: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr):
    """A block of columns of one head's (d, 2 NB BK) map from a query to its series: [BD, BK]."""
    o_d = tl.arange(0, BD)
    o_k = i_block * BK + tl.arange(0, BK)
    p_onto = onto_ptr + o_d[:, None] * (2 * NB * BK) + o_k[None, :]
    return tl.load(p_onto, mask=(o_d < d)[:, None], other=0.0)


@triton.jit
def turn(x, y, turns_ptr, i_turn, i_block, BM: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr):
    """x cos + y sin and x sin - y cos of a block, at the rows from ``i_turn`` of the fp32 table of angles."""
    cosine = load_block(turns_ptr, i_turn, i_block, BM, NB, BK)
    sine = load_block(turns_ptr, i_turn, NB + i_block, BM, NB, BK)
    return x * cosine + y * sine, x * sine - y * cosine


@triton.jit
def query_features(
    q, onto_ptr, turns_ptr, i_turn, d,
    PRECISION: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Features of queries that hold their position bias: 2 NB tensors [BM, BK] in the queries' dtype."""
    features = ()
    for i_block in tl.static_range(NB):
        c = tl.dot(q, load_onto(onto_ptr, i_block, d, BD, NB, BK), input_precision=PRECISION)
        s = tl.dot(q, load_onto(onto_ptr, NB + i_block, d, BD, NB, BK), input_precision=PRECISION)
        f, g = turn(c, s, turns_ptr, i_turn, i_block, BM, NB, BK)
        features = features + (f.to(q.dtype), g.to(q.dtype))  # type: ignore[assignment]  # noqa: RUF005 (Triton concatenates tuples, no stars)
    return features


@triton.jit
def load_features(features_ptr, i_row, BM: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr):
    """What query_features returns, from rows that a kernel wrote."""
    features = ()
    for i_block in tl.static_range(NB):
        f = load_block(features_ptr, i_row, i_block, BM, NB, BK)
        g = load_block(features_ptr, i_row, NB + i_block, BM, NB, BK)
        features = features + (f, g)  # type: ignore[assignment]  # noqa: RUF005
    return features


@triton.jit
def add_position_scores(
    scores, features, basis_ptr, i_turn, PRECISION: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr
):
    """Scores [BM, BN] plus the position term against the keys at the rows from ``i_turn`` of the basis."""
    for i_block in tl.static_range(NB):
        cosine = load_block(basis_ptr, i_turn, i_block, BN, NB, BK)
        sine = load_block(basis_ptr, i_turn, NB + i_block, BN, NB, BK)
        scores = tl.dot(features[2 * i_block], tl.trans(cosine), acc=scores, input_precision=PRECISION)
        scores = tl.dot(features[2 * i_block + 1], tl.trans(sine), acc=scores, input_precision=PRECISION)
    return scores
