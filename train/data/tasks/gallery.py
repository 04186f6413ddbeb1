"""One self-contained HTML page of samples: question, picture, steps with the pictures between them, answer."""

import base64
from html import escape
from pathlib import Path

from conversion.reading import is_file, read_json_lines
from conversion.writing import write_file


GALLERY_SIZE = 120  # samples; a page with thousands of pictures does not open
STYLE = (
    "body{font:15px/1.4 sans-serif;margin:1em auto;max-width:1500px;padding:0 1em;background:#f4f4f4;color:#222}"
    "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(440px,1fr));gap:1em}"
    "article{background:#fff;padding:1em;border-radius:6px}"
    "img{display:block;margin:.4em 0;max-width:100%}p{margin:.3em 0}small{color:#666}"
)


def write_gallery(data: str | Path, output: str | Path | None = None, limit: int = GALLERY_SIZE) -> Path:
    """Write the first samples of each task in a `data.jsonl` as one page; return its path.

    Args:
        output: default is `gallery.html` beside `data`.
        limit: largest number of samples, shared evenly by the tasks.

    Raises:
        ValueError: there is no file `data`, it holds no sample, or `limit < 1`.
    """
    data = Path(data)
    if not is_file(data):
        raise ValueError(f"`data` must be a `data.jsonl` of `train.data.tasks`, but there is no file {data}.")
    if limit < 1:
        raise ValueError(f"`limit` must be >= 1, got {limit}.")
    rows = []
    for origin, row in read_json_lines(data):
        check_row(row, origin, data.parent)
        rows.append(row)
    if not rows:
        raise ValueError(f"`data` must hold samples, but {data} is empty.")
    by_task: dict[str, list[dict]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    share = max(1, limit // len(by_task))
    shown = [row for some in by_task.values() for row in some[:share]][:limit]
    articles = "\n".join(_article(row, data.parent) for row in shown)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tasks</title><style>{STYLE}</style>'
        f"<h1>Tasks</h1><p>{len(shown)} of {len(rows)} samples of {escape(data.parent.name)}</p>"
        f"<main>{articles}</main></html>\n"
    )
    output = data.parent / "gallery.html" if output is None else Path(output)
    write_file(output, page)
    return output


def check_row(row: object, origin: str, folder: Path) -> None:
    """Refuse a row that `train.data.tasks` did not write, before anything is drawn.

    Raises:
        ValueError: a field is missing or of the wrong kind, or a picture does not exist; the message names the row.
    """
    kinds = {"id": str, "task": str, "family": str, "answer_type": str, "chance": float, "messages": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)]
    if wrong or len(row["messages"]) != 2:
        raise ValueError(
            f"{origin} must be a sample of `train.data.tasks`, but {', '.join(wrong) or 'messages'} is not what it writes."
        )
    for message in row["messages"]:
        items = message.get("content") if isinstance(message, dict) else None
        for item in items if isinstance(items, list) else [None]:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in ("text", "image") or not isinstance(item.get(kind), str):
                raise ValueError(f"{origin}: a message must hold texts and images, got {str(item)[:200]!a}.")
            if kind == "image" and not is_file(folder / item["image"]):  # nor a pipe, which would never end
                raise ValueError(f"{origin} names an image that does not exist: {item['image'][:500]}.")


def _article(row: dict, folder: Path) -> str:
    user, assistant = ([_item(part, folder) for part in message["content"]] for message in row["messages"])
    about = f"{row['id']}, family {row['family']}, {row['answer_type']}, chance {100 * row['chance']:.1f} %"
    return f"<article>{''.join(user)}<hr>{''.join(assistant)}<small>{escape(about)}</small></article>"


def _item(part: dict, folder: Path) -> str:
    if part["type"] == "text":
        return f"<p>{escape(part['text'])}</p>"
    from processing_latentvlm.pictures import open_picture  # here, since it imports torch

    path = folder / part["image"]
    open_picture(path, f"The image {path}")  # refuses what is no picture, such as a pipe that would never end
    picture = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(Path(part["image"]).name)}" src="data:image/png;base64,{picture}">'
