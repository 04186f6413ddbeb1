"""What `generate` checks of its inputs, once and before anything runs: what passes here can be decoded.

Each check reads the device at most once per call, never per token.

Shapes: B rows, S columns of `input_ids`, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_ids(input_ids, vocabulary_size: int) -> Tensor:
    """`input_ids` as 64-bit integers, (B, S).

    Raises:
        ValueError: no tensor of whole numbers, another shape, nothing in it, or a token that has no embedding.
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` must be a tensor of whole numbers, got {got}.")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(
            f"`input_ids` must have the shape (rows, columns), at least one of each, got {tuple(input_ids.shape)}."
        )
    lowest, highest = torch.stack([input_ids.amin(), input_ids.amax()]).tolist()
    if lowest < 0 or highest >= vocabulary_size:
        wrong = (input_ids < 0) | (input_ids >= vocabulary_size)
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"Tokens must lie within 0..{vocabulary_size - 1}, but row {row} of `input_ids` has {int(input_ids[row, column])} at "
            f"column {column}."
        )
    return input_ids.long()


def check_prompt_mask(attention_mask, shape: tuple[int, ...]) -> None:
    """Raise unless `attention_mask` is zeros and ones of `shape`, with a one in every row."""
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != tuple(shape):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"`attention_mask` must have the shape of `input_ids` {tuple(shape)}, got {got}.")
    is_one = attention_mask == 1
    fine = torch.stack([(is_one | (attention_mask == 0)).all(dim=1), is_one.any(dim=1)], dim=1).tolist()
    for row, (is_binary, is_any) in enumerate(fine):
        if not is_binary:
            raise ValueError(f"`attention_mask` must hold zeros and ones, but row {row} holds other numbers.")
        if not is_any:
            raise ValueError(f"`attention_mask` of row {row} is all zeros: nothing of its prompt could be read.")


def check_numbers(**tensors) -> None:
    """Raise unless each tensor, where it is given, holds finite floating-point numbers; the message names the first that is not."""
    for name, values in tensors.items():
        if values is None:
            continue
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"`{name}` must be a tensor of floating-point numbers, got {got}.")
        if values.numel() and not bool(values.isfinite().all()):
            first = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"`{name}` must be finite, but holds NaN or infinity, first at index {first}.")


def check_grids(grid_thw, kind: str, merge_size: int) -> list[tuple[int, int, int]]:
    """The rows (t, h, w) of `image_grid_thw` or `video_grid_thw`, in patches, as numbers: one read of the device.

    Raises:
        ValueError: no tensor of whole numbers of the shape (items, 3), or a side that cannot be merged.
    """
    name = f"{kind}_grid_thw"
    if (
        not isinstance(grid_thw, Tensor)
        or grid_thw.is_floating_point()
        or grid_thw.ndim != 2
        or grid_thw.shape[1] != 3
    ):
        got = (
            f"{grid_thw.dtype} of {tuple(grid_thw.shape)}" if isinstance(grid_thw, Tensor) else type(grid_thw).__name__
        )
        raise ValueError(
            f"`{name}` must be a tensor of whole numbers (t, h, w) for every {kind}, shape (items, 3), got {got}."
        )
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    for item, (frames, height, width) in enumerate(grids):
        if min(frames, height, width) < 1 or height % merge_size or width % merge_size:
            raise ValueError(
                f"`{name}` must hold t >= 1 and h and w that are multiples of {merge_size} (patches that are merged), but "
                f"{kind} {item} has {(frames, height, width)}."
            )
    return grids


def check_turns(is_place: Tensor, input_ids: Tensor, mask: Tensor | None, eos: list[int], what: str) -> None:
    """Raise where latents of an earlier turn would be all that a row gets: behind their place a turn has ended.

    Args:
        is_place: (B, S) bool, the columns that say where steps go.
        eos: tokens that end a turn.
        what: the name of those columns, for the message.
    """
    if not eos:
        return
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (columns * is_place).amax(dim=1, keepdim=True)
    is_end = torch.isin(input_ids, torch.tensor(eos, device=input_ids.device)) & (columns > last)
    if mask is not None:
        is_end &= mask.to(input_ids.device).bool()
    rows = (is_end & is_place.any(dim=1, keepdim=True)).any(dim=1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"In rows {rows} of the prompt {what} stand before the end of an earlier turn, so the new answer would get no steps "
            "of its own. Leave them out of earlier turns: the steps are then taken behind the whole prompt."
        )


def end_tokens(*values) -> list[int]:
    """The end tokens of several settings, each an id, several or None."""
    found: list[int] = []
    for value in values:
        value = value.tolist() if isinstance(value, Tensor) else value
        found += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return sorted(set(found))


def check_labels(labels: Tensor | None, input_ids: Tensor) -> None:
    """Raise unless `labels`, where they are given, have the rows and columns of the tokens: they say where answers start."""
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` must have the rows and columns of `input_ids` {tuple(input_ids.shape)}, got {tuple(labels.shape)}."
        )


def check_not_within_image(answer_starts: Tensor, is_image: Tensor) -> None:
    """Raise where an answer starts within an image: the steps before it would see a part of that image.

    Args:
        answer_starts: (B,) columns from 1 to S.
        is_image: (B, S) bool, the columns of image tokens.
    """
    starts = answer_starts.to(is_image.device)[:, None]
    is_parted = is_image.gather(1, starts - 1) & F.pad(is_image, (0, 1)).gather(1, starts)
    rows = is_parted[:, 0].nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"`answer_starts` must not lie within an image, but in rows {rows} they do.")


def check_image_labels(labels: Tensor, is_image: Tensor, steps: str) -> None:
    """Raise where image tokens are labels: the prompt ends at the first label, so no step would see those images."""
    rows = ((labels != -100).to(is_image.device) & is_image).any(dim=1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"Image tokens cannot be labels, but in rows {rows} they are: {steps} are taken before the first label and would not "
            "see those images. Set the labels of the prompt to -100 (with TRL: rows of `prompt` and `completion`, or "
            "`assistant_only_loss=True`)."
        )
