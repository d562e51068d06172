"""Text as pages and PDFs give it, prose beside lines that say little: for the ratio head, and as a task.

    python benchmarks/mixed_density.py texts data/text_*.jsonl.xz > mixed.jsonl
    python benchmarks/mixed_density.py task data/squad_dev.jsonl.xz > squad_mixed.jsonl

`texts` prints paragraphs of the files, some replaced by sparse lines (footers, empty forms, markup) and some
by dense ones (figures, codes): what `ctxcompress fit-ratio-head` may learn from. `task` prints the questions
of a file, each document between sparse lines of other kinds than those of `texts`, together about as long as
the document.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Callable, Iterator

from ctxcompress.train.data import read_lines

Draw = random.Random
Lines = Callable[[Draw], Iterator[str]]
NAMES = ("Northwind", "Hillside", "Redwood", "Lakeview", "Fairmont", "Brightwater", "Oakfield", "Stonebridge")
NOUNS = ("Trading", "Library", "Institute", "Museum", "Foundation", "Press", "Archive", "Society")
FIELDS = ("Name", "Date", "Address", "Phone", "Signature", "Email", "Comments", "Department", "City", "Total")
HEADINGS = ("Introduction", "Background", "Methods", "Results", "Discussion", "Index", "Notes", "References")
LEAST = 160  # characters of a paragraph of `texts`
SPARSE_PART, DENSE_PART = 0.3, 0.1


def _again(line: str) -> Iterator[str]:
    while True:
        yield line


def _footer(draw: Draw) -> Iterator[str]:
    name = f"{draw.choice(NAMES)} {draw.choice(NOUNS)}"
    return _again(f"Copyright {draw.randint(1990, 2024)} {name}. All rights reserved.")


def _contents(draw: Draw) -> Iterator[str]:
    page = 1
    while True:
        page += draw.randint(1, 9)
        yield f"{draw.choice(HEADINGS)} {'.' * draw.randint(12, 40)} {page}"


def _equal_cells(draw: Draw) -> Iterator[str]:
    cell = draw.choice(["0", "0.00", "0 %", "-", "none", "0.0"])
    return _again(draw.choice([" ", "  ", " | ", "\t"]).join([cell] * draw.randint(4, 9)))


def _form(draw: Draw) -> Iterator[str]:
    while True:
        yield f"{draw.choice(FIELDS)}: {'_' * draw.randint(8, 30)}"


def _markup(draw: Draw) -> Iterator[str]:
    tag = draw.choice(["td", "li", "div", "p", "br"])
    return _again(f"<{tag}></{tag}>" * draw.randint(2, 5))


def _pages(draw: Draw) -> Iterator[str]:
    count = draw.randint(20, 90)
    for page in range(1, count):
        yield f"Page {page} of {count}"


def _log(draw: Draw) -> Iterator[str]:
    step = draw.randint(1, 100)
    while True:
        step += 1
        yield f"[INFO] step {step} done"


def _rule(draw: Draw) -> Iterator[str]:
    return _again(draw.choice("-=*_~#") * draw.randint(20, 60))


def _figures(draw: Draw) -> Iterator[str]:
    digits = draw.randint(2, 6)
    while True:
        yield " ".join(f"{draw.random() * 10**digits:.{draw.randint(0, 3)}f}" for _ in range(6))


def _codes(draw: Draw) -> Iterator[str]:
    while True:
        yield f"{draw.getrandbits(64):016x} {draw.choice(NAMES)[:3].upper()}-{draw.getrandbits(24)}"


def _letters(draw: Draw) -> Iterator[str]:
    while True:
        words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(8)]
        yield " ".join(words)


def _menu(draw: Draw) -> Iterator[str]:
    entries = draw.sample(["Home", "About us", "Products", "News", "Contact", "Login", "Help", "Search"], 5)
    return _again(" | ".join(entries))


def _no_data(draw: Draw) -> Iterator[str]:
    return _again(" ".join(["n/a"] * draw.randint(4, 8)))


def _share(draw: Draw) -> Iterator[str]:
    places = draw.sample(["Facebook", "Twitter", "Reddit", "LinkedIn"], 2)
    return _again(f"Share on {places[0]} Share on {places[1]} Print this page")


def _grid(draw: Draw) -> Iterator[str]:
    return _again(" ".join(draw.choices(["Yes", "No"], k=6)))


def _cookies(draw: Draw) -> Iterator[str]:
    return _again(
        f"We use cookies on our website. By using {draw.choice(NAMES)} you agree. Accept all cookies."
    )


def _waiting(draw: Draw) -> Iterator[str]:
    return _again(draw.choice(["Loading... Please wait.", "Image not available.", "Advertisement"]))


SEEN: tuple[Lines, ...] = (_footer, _contents, _equal_cells, _form, _markup, _pages, _log, _rule)
DENSE: tuple[Lines, ...] = (_figures, _codes, _letters)
HELD_OUT: tuple[Lines, ...] = (_menu, _no_data, _share, _grid, _cookies, _waiting)


def lines_of(draw: Draw, kinds: tuple[Lines, ...], characters: int) -> str:
    """Lines of one kind, `characters` of them or a little more."""
    lines: list[str] = []
    for line in draw.choice(kinds)(draw):
        lines.append(line)
        if sum(map(len, lines)) >= characters:
            break
    return "\n".join(lines)


def paragraphs(files: list[str], count: int, draw: Draw) -> Iterator[str]:
    """Paragraphs of texts of the files, in turn one of each file, some replaced."""
    texts = [[record["text"] for record in read_lines(file, "text")] for file in files]
    made = 0
    while made < count:
        own = [part for part in draw.choice(texts[made % len(texts)]).split("\n") if len(part) >= LEAST]
        if not own:
            continue
        made += 1
        paragraph = draw.choice(own)
        kinds = draw.choices([SEEN, DENSE, None], [SPARSE_PART, DENSE_PART, 1 - SPARSE_PART - DENSE_PART])[0]
        yield lines_of(draw, kinds, len(paragraph)) if kinds else paragraph


def main() -> None:
    """Print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("texts", "task"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("--count", type=int, default=1200, help="paragraphs of `texts`")
    arguments = parser.parse_args()
    draw = Draw(0)
    if arguments.what == "texts":
        for text in paragraphs(arguments.files, arguments.count, draw):
            print(json.dumps({"text": text}))
        return
    for file in arguments.files:
        for record in read_lines(file, "question", "documents"):
            for document in record["documents"]:
                around = [lines_of(draw, HELD_OUT, len(document["text"]) // 2) for _ in range(2)]
                document["text"] = f"{around[0]}\n\n{document['text']}\n\n{around[1]}"
            print(json.dumps(record))


if __name__ == "__main__":
    main()
