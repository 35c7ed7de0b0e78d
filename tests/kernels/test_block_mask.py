"""Block masks: the compressed form, the static policies, the choice at run time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdqc.base.block_mask import (
    BlockMask,
    block_means,
    blocks,
    check,
    choose,
    compress,
    expand,
    full_mask,
    kept_blocks,
)
from vdqc.base.diagnostics import InputError
from vdqc.base.mask_policies import (
    POLICIES,
    Layout,
    classify_heads,
    frame_order,
    inverse,
    pixel_order,
    sampled_rows,
    sliding_tile,
    spatial_band,
    tile_order,
)
from vdqc.base.numerics import relative_error
from vdqc.kernels.block_mask import BLOCK_MASK_TOPK, block_mask_topk

OPS = torch.ops.vdqc_kernels
LAYOUTS = st.builds(
    Layout,
    frames=st.integers(1, 9),
    tokens_per_frame=st.sampled_from([24, 40, 96]),
    text=st.sampled_from([0, 1, 13, 32]),
    text_first=st.booleans(),
    frame_width=st.just(8),
    sinks=st.integers(0, 1),
)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_compressing_loses_nothing(rows: int, columns: int, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    kept = torch.rand(2, 3, rows, columns) < density
    starts, counts, ids = compress(kept)
    assert torch.equal(kept_blocks(starts, counts, ids, columns), kept)
    mask = BlockMask(starts, counts, ids, 16 * rows, 16 * columns - 3, 16, 16)
    assert check(mask) == int((counts == 0).sum())
    assert mask.density() == pytest.approx(float(kept.float().mean()))
    assert mask.dense().shape == (2, 3, 16 * rows, 16 * columns - 3)


def test_expanding_repeats_and_cuts() -> None:
    kept = torch.tensor([[True, False], [False, True]])
    wide = expand(kept, 3, 2, 4, 3)
    assert wide.int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_damaged_masks_are_refused() -> None:
    def mask(starts: list[int], counts: list[int], ids: list[int]) -> BlockMask:
        shaped = [torch.tensor(x, dtype=torch.int32)[None, None] for x in (starts, counts)]
        return BlockMask(*shaped, torch.tensor(ids, dtype=torch.int32), 32, 64, 16, 16)

    assert check(mask([0, 2], [2, 0], [1, 3])) == 1
    for bad, message in (
        (mask([0], [2], [1, 3]), "starts and counts of"),
        (mask([0, 1], [2, 2], [1, 3]), "ends beyond its 2 ids"),
        (mask([0, 0], [2, 5], [1, 3]), "0 ... 4 key blocks a row, got 5"),
        (mask([0, 0], [2, 1], [1, 4]), "key blocks 0 ... 3, got 4"),
        (mask([0, 0], [2, 2], [3, 1]), "ascend without repeats"),
    ):
        with pytest.raises(InputError, match=message):
            check(bad)


def test_heads_may_share_the_rows_of_masks() -> None:
    layout = Layout(4, 32)
    masks = [spatial_band(layout, density, 16, 16) for density in (0.3, 0.7)]
    choice = torch.tensor([[0, 1, 1], [1, 0, 1]])
    both = choose(masks, choice)
    assert check(both) == 0
    for b in range(2):
        for h in range(3):
            assert torch.equal(both.kept()[b, h], masks[choice[b, h]].kept()[0, 0])
    with pytest.raises(InputError, match="same sizes"):
        choose([masks[0], full_mask(128, 128)], choice)


@given(x=st.sampled_from([(1, 16), (40, 16), (48, 16), (7, 16)]), seed=st.integers(0, 9))
def test_means_of_blocks(x: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    tokens, size = x
    value = torch.randn(2, tokens, 3, dtype=torch.bfloat16)
    found = block_means(value, size)
    assert found.shape == (2, blocks(tokens, size), 3)
    for place in range(found.shape[1]):
        own = value[:, place * size : (place + 1) * size].double().mean(1)
        assert relative_error(found[:, place], own) < 1e-6


@given(
    layout=LAYOUTS,
    policy=st.sampled_from(sorted(POLICIES)),
    density=st.floats(0.3, 1.0),
    sizes=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
)
def test_static_masks(layout: Layout, policy: str, density: float, sizes: tuple[int, int]) -> None:
    order = POLICIES[policy].order(layout, "cpu")
    assert torch.equal(order.sort().values, torch.arange(layout.tokens))
    assert torch.equal(order[inverse(order)], torch.arange(layout.tokens))
    try:
        mask = POLICIES[policy].mask(layout, density, *sizes, "cpu")
    except InputError as error:
        if error.diagnostic.code != "density":
            raise
        return
    assert check(mask) == 0
    assert mask.density() <= density + 1e-9
    kept, dense = mask.kept()[0, 0], mask.dense()[0, 0]
    text = order >= layout.video if not layout.text_first else order < layout.text
    video = order - layout.first
    sinks = ~text & (video < layout.sinks * layout.tokens_per_frame)
    assert dense[text].all()
    assert dense[:, text | sinks].all()
    assert dense.diagonal().all()
    own = kept.sum(-1)[kept.sum(-1) < mask.columns]
    assert own.numel() == 0 or int(own.min()) == int(own.max())
    if own.numel():  # one block more in every row would be too much
        assert mask.density() + own.numel() / kept.numel() > density


def test_the_same_policy_at_another_resolution() -> None:
    small, large = Layout(4, 64), Layout(8, 256)
    for policy in ("spatial_band", "radial"):
        for layout in (small, large):
            mask = POLICIES[policy].mask(layout, 0.4, 16, 16, "cpu")
            assert mask.queries == layout.tokens
            assert 0.3 < mask.density() <= 0.4


def test_a_density_out_of_reach() -> None:
    with pytest.raises(InputError, match=r"at least 0\.\d+ for 33 x 33 blocks, got 0\.05"):
        spatial_band(Layout(8, 64, text=16), 0.05, 16, 16)
    with pytest.raises(InputError, match="width of a frame of 64 tokens, got 0"):
        sliding_tile(Layout(8, 64), 0.5, 16, 16)


def test_pixel_order_makes_frames_neighbours() -> None:
    layout = Layout(3, 4, text=2, text_first=True, sinks=1)
    order = pixel_order(layout).tolist()
    assert order == [0, 1, 2, 3, 4, 5, 6, 10, 7, 11, 8, 12, 9, 13]


def test_tiles_become_blocks() -> None:
    layout = Layout(4, 64, frame_width=8)
    order = tile_order(layout, tile=(2, 4, 4))
    first = order[:32]
    frame, row, column = first // 64, first % 64 // 8, first % 8
    assert (frame < 2).all()
    assert (row < 4).all()
    assert (column < 4).all()
    mask = sliding_tile(layout, 0.5, 32, 32, tile=(2, 4, 4))  # 2 x 2 x 2 tiles: the nearest half
    apart = [[bin(a ^ b).count("1") for b in range(8)] for a in range(8)]
    for row_of, kept in zip(apart, mask.kept()[0, 0].tolist(), strict=True):
        assert sorted(d for d, on in zip(row_of, kept, strict=True) if on) == [0, 1, 1, 1]


def test_heads_are_told_apart() -> None:
    layout = Layout(8, 32, text=8)
    n, width = layout.tokens, 16
    frame, pixel = torch.arange(n) // 32, torch.arange(n) % 32
    spatial = torch.nn.functional.one_hot(frame, width).float()
    temporal = torch.nn.functional.one_hot(pixel // 2, width).float()
    q = torch.stack([spatial, temporal, spatial])[None] * 6
    value = torch.randn(1, 3, n, 4)
    masks = [
        (order(layout), spatial_band(layout, 0.4, 8, 8)) for order in (frame_order, pixel_order)
    ]
    choice, errors = classify_heads(q, q, value, 1.0, masks, sampled_rows(layout, 40))
    assert choice.tolist() == [[0, 1, 0]]
    assert errors.shape == (2, 1, 3)
    full = [(frame_order(layout), full_mask(n, n, block_q=8, block_k=8))]
    assert classify_heads(q, q, value, 1.0, full, torch.arange(n))[1].max() < 1e-10


def kept_of(mask: tuple[torch.Tensor, ...], columns: int) -> torch.Tensor:
    return kept_blocks(*mask, columns)  # type: ignore[arg-type]


@given(
    rows=st.integers(1, 7),
    keep=st.integers(1, 9),
    text=st.sampled_from([(0, 0), (1, 0), (0, 1)]),
    always=st.sampled_from([(0, 0), (1, 0), (0, 2)]),
    sizes=st.sampled_from([(0, 0), (16, 16), (32, 16), (16, 32)]),
    seed=st.integers(0, 99),
)
def test_rows_keep_their_best_blocks(
    rows: int,
    keep: int,
    text: tuple[int, int],
    always: tuple[int, int],
    sizes: tuple[int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    bq, bk = sizes
    columns = blocks(rows * bq, bk) if bk else 8
    always = (min(always[0], columns), min(always[1], columns - min(always[0], columns)))
    q = torch.randint(-2, 3, (2, 2, rows, 3)).float()
    k = torch.randint(-2, 3, (2, 2, columns, 3)).float()
    mask = OPS.block_mask_topk(q, k, 0.5, keep, 0.0, list(text), list(always), bq, bk)
    kept = kept_of(mask, columns)
    assert check(BlockMask(*mask, rows, columns, 1, 1)) == 0
    assert kept[:, :, : text[0]].all()
    assert kept[:, :, rows - text[1] :].all()
    assert kept[..., : always[0]].all()
    assert kept[..., columns - always[1] :].all()
    scores = q @ k.mT
    for row in range(text[0], rows - text[1]):
        forced = torch.zeros(columns, dtype=torch.bool)
        forced[: always[0]] = True
        forced[columns - always[1] :] = True
        if bk:
            forced[row * bq // bk : blocks((row + 1) * bq, bk)] = True
        own, score = kept[:, :, row], scores[:, :, row]
        assert (own.sum(-1) == max(min(keep, columns), int(forced.sum()))).all()
        assert own[..., forced].all()
        worst = score.masked_fill(~own | forced, float("inf")).amin(-1)
        best = score.masked_fill(own | forced, float("-inf")).amax(-1)
        assert (worst >= best).all()


@given(mass=st.floats(0.1, 1.0), keep=st.integers(1, 4), seed=st.integers(0, 99))
def test_rows_keep_blocks_until_their_mass(mass: float, keep: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4)
    mask = OPS.block_mask_topk(q, k, 1.0, keep, mass, [0, 0], [1, 0], 0, 0)
    p, kept = torch.softmax(q @ k.mT, -1), kept_of(mask, 9)
    reached = (p * kept).sum(-1)
    assert (reached >= mass - 1e-5).all()
    assert (kept.sum(-1) >= keep).all()
    least = p.masked_fill(~kept, float("inf"))[..., 1:].amin(-1)  # without it: too little
    assert ((reached - least < mass + 1e-5) | (kept.sum(-1) <= keep)).all()


def test_scores_that_are_not_numbers_rank_last() -> None:
    q, k = torch.ones(1, 1, 2, 4), torch.randn(1, 1, 5, 4)
    k[..., 3, :] = float("nan")
    mask = OPS.block_mask_topk(q, k, 1.0, 4, 0.0, [0, 0], [0, 0], 0, 0)
    assert kept_of(mask, 5)[0, 0].tolist() == [[True, True, True, False, True]] * 2


def test_opcheck_and_bad_input() -> None:
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    for tail in (
        (3, 0.0, [0, 1], [0, 1], 128, 128),
        (1, 0.7, [1, 0], [0, 0], 0, 0),
        (2, 0.0, [3, 3], [6, 0], 128, 64),
    ):
        torch.library.opcheck(
            BLOCK_MASK_TOPK.op, (q, k, 0.5, *tail), test_utils=("test_schema", "test_faketensor")
        )
    for tail, message in (
        ((0, 0.0, [0, 0], [0, 0], 0, 0), "keep >= 1"),
        ((1, 1.5, [0, 0], [0, 0], 0, 0), "got 1 and 1.5"),
        ((1, 0.0, [0], [0, 0], 0, 0), "leading and trailing"),
        ((1, 0.0, [5, 2], [0, 0], 0, 0), "at most 6 rows"),
    ):
        with pytest.raises(InputError, match=message):
            block_mask_topk(q, k, 0.5, *tail)  # type: ignore[arg-type]
