"""The window found is the best of all, and the first of equals."""

import pytest
import torch

from modeling_latentvlm.sliding_window_lare import (
    VisualTokens,
    find_window,
    focus_on_all,
    focus_on_windows,
    pool_windows,
    window_tokens,
)


pytestmark = pytest.mark.core


def best_by_hand(maps: torch.Tensor, size: int) -> list[tuple[int, int, int]]:
    """Every window of every image, in raster order; only a larger sum replaces the best so far."""
    found = []
    for row in maps:
        best, place = -float("inf"), None
        for image, values in enumerate(row):
            for top in range(len(values) - size + 1):
                for left in range(len(values) - size + 1):
                    total = float(values[top : top + size, left : left + size].sum())
                    if total > best:
                        best, place = total, (image, top, left)
        found.append(place)
    return found


@pytest.mark.parametrize("grid, size", [(4, 1), (4, 2), (5, 3), (7, 4), (4, 4), (16, 8)])
@pytest.mark.parametrize("levels", [2, 3, 1000])
def test_the_window_is_the_best_of_all(grid, size, levels):
    """Few levels make many ties; whole numbers make the sums exact."""
    maps = torch.randint(0, levels, (40, 3, grid, grid)).float()
    maps[::3, 2] = -float("inf")  # rows with fewer images
    maps[::6, 1] = -float("inf")
    assert [tuple(place) for place in find_window(maps, size).tolist()] == best_by_hand(maps, size)


def test_equal_maps_tie_at_the_first_place():
    maps = torch.full((1, 2, 5, 5), 0.1)
    assert find_window(maps, 3).tolist() == [[0, 0, 0]]
    maps[0, 1] += 0.01
    assert find_window(maps, 3).tolist() == [[1, 0, 0]]


def test_pooling_is_a_sum():
    maps = torch.rand(2, 3, 6, 6)
    expected = maps.unfold(2, 3, 1).unfold(3, 3, 1).sum(dim=(-1, -2))
    torch.testing.assert_close(pool_windows(maps, 3), expected)


def test_the_tokens_of_a_window():
    assert window_tokens(torch.tensor([[1, 2, 1]]), 2, 4).tolist() == [[25, 26, 29, 30]]
    everything = window_tokens(torch.tensor([[0, 0, 0]]), 4, 4)
    assert everything.tolist() == [list(range(16))]


def test_further_windows_count_what_is_left():
    """The second best place overlaps the best; without the tokens taken, another one wins, and no token comes twice."""
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, :3] = torch.tensor([5.0, 9.0, 6.0])
    maps[0, 0, 3, 3] = 7.0
    focus = focus_on_windows(maps, 2, 3)
    assert focus.windows.tolist() == [[[0, 0, 1], [0, 2, 2], [0, 0, 0]]]
    kept = focus.tokens[focus.exists].tolist()
    assert len(kept) == len(set(kept)) and set(kept) == {1, 2, 5, 6, 10, 11, 14, 15, 0, 4}


def test_a_row_without_images_looks_at_nothing():
    maps = torch.rand(2, 1, 4, 4)
    maps[1] = -float("inf")
    focus = focus_on_windows(maps, 2, 2)
    assert focus.exists[0].any() and not focus.exists[1].any()
    assert focus.windows[1].tolist() == [[-1, -1, -1]] * 2


def test_image_tokens_of_ragged_rows():
    is_image = torch.zeros(3, 10, dtype=torch.bool)
    is_image[0, 1:5] = is_image[1, 0:4] = is_image[1, 6:10] = True
    embeds = torch.arange(10.0).expand(3, 10)[..., None]
    tokens = VisualTokens.find(is_image, embeds, 2)
    assert tokens.columns[1].tolist() == [0, 1, 2, 3, 6, 7, 8, 9] and tokens.columns[0, :4].tolist() == [1, 2, 3, 4]
    assert tokens.exists.sum(dim=1).tolist() == [4, 8, 0]
    assert tokens.take(torch.arange(8).expand(3, 8))[1, :, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    maps = tokens.maps(torch.arange(10.0).expand(3, 10))
    assert maps.shape == (3, 2, 2, 2)
    assert maps[1].flatten().tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert maps[0, 1].isinf().all() and maps[2].isinf().all()
    assert torch.equal(focus_on_all(tokens).exists, tokens.exists)
