"""ctxcompress compress | ask | index | evaluate | bench | calibrate | train: the library on the command line.

Results go to standard output, everything else (progress, tables beside plain text, errors) to standard error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from ctxcompress import __version__
from ctxcompress.config import (
    AllocatorName,
    DACConfig,
    DASTConfig,
    DASTMode,
    Mode,
    Prior,
    check_target,
    one_of,
    to_dict,
)
from ctxcompress.embedded import EMBEDDED
from ctxcompress.errors import CtxCompressError, InputError
from ctxcompress.files import decoded, read_text

if TYPE_CHECKING:
    from ctxcompress.embedder import Embedder
    from ctxcompress.pipeline import ContextCompressor
    from ctxcompress.types import CompressedDocument, CompressionResult

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench_app, name="bench")
store_app = typer.Typer(no_args_is_help=True, help="Look after stores of encoded documents.")
app.add_typer(store_app, name="store")
errors = Console(stderr=True)
output = Console(width=None if sys.stdout.isatty() else 160)

Budget = Annotated[
    int | None, typer.Option(help="Most tokens of all documents together. Give this or --ratio.")
]
Ratio = Annotated[float | None, typer.Option(help="Original tokens / compressed tokens, >= 1.")]
RatioScale = Annotated[
    float | None,
    typer.Option(help="For semi_dynamic, in place of a budget: added to predicted log2 ratios; +1 doubles."),
]
_TextMode = Literal["auto", "text"]
_FixedMode = Literal["text", "soft"]
TextModeOption = Annotated[str, typer.Option("--mode", help="How a document shrinks: auto or text.")]
ModeOption = Annotated[
    str, typer.Option(help="How a document shrinks: text, soft, or auto for the better one.")
]
Allocator = Annotated[
    str,
    typer.Option(
        help="Who gets how much: dast, uniform, random, bm25, embedding, semi_dynamic, dast+semi_dynamic."
    ),
]
Model = Annotated[str, typer.Option(help='"embedded", a local folder, or a Hugging Face hub id.')]
Adapter = Annotated[
    str, typer.Option(help='Soft-token adapter: "embedded" (ships with the model), a folder, or a hub id.')
]
PriorOption = Annotated[
    str, typer.Option(help="Whether the retriever's scores count as evidence: retriever or none.")
]
CalibrationFile = Annotated[
    Path | None, typer.Option(help="Calibration of the model, made by `ctxcompress calibrate`.")
]
EmbedderName = Annotated[
    str, typer.Option(help='"embedded" (MiniLM), or a sentence-transformers folder or hub id.')
]
Seed = Annotated[int, typer.Option(help="Of the random allocator and of bootstrap intervals.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
IndexFolder = Annotated[
    Path | None, typer.Option("--index", help="Where the index is kept; default: FOLDER/.ctxcompress.")
]
StoreFolder = Annotated[
    Path | None, typer.Option("--store", help="Where soft tokens are kept; default: store, in the index.")
]
ChunkTokens = Annotated[
    int | None, typer.Option(help="Most tokens of a chunk, which gets a ratio of its own; default: 64.")
]
TaskFile = Annotated[Path, typer.Option("--task", help="Questions: .jsonl or .jsonl.xz.")]
Limit = Annotated[int | None, typer.Option(help="Questions to read.")]
Offset = Annotated[int, typer.Option(help="Questions to leave out at the start of the file.")]


@app.command()
def compress(
    files: Annotated[list[str] | None, typer.Argument(help='Text files, or "-" for standard input.')] = None,
    query: Annotated[str, typer.Option(help="The question the text is compressed for.")] = "",
    budget: Budget = None,
    ratio: Ratio = None,
    mode: TextModeOption = "auto",
    allocator: Allocator = "dast",
    model: Model = EMBEDDED,
    calibration: CalibrationFile = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Shorten files so that together they fit a budget, each by what it is worth for the query."""
    from ctxcompress.types import Document

    with _reported():
        check_target(budget, ratio)
        one_of("mode", mode, _TextMode)
        names = files or ["-"]
        documents = [Document(_read(name), id=name, metadata={"source": name}) for name in names]
        with _progress() as report:
            compressor = _loaded(report, model, calibration, seed)
            result = compressor.compress(
                documents,
                query,
                budget=budget,
                compression_ratio=ratio,
                mode="text",
                allocator=one_of("allocator", allocator, AllocatorName),
                progress=report,
            )
        if as_json:
            _print_json({**result.to_dict(), "text": result.text})
        else:
            sys.stdout.write(result.text + "\n")
            errors.print(_table(result))


@app.command()
def ask(
    folder: Annotated[Path, typer.Argument(help="Folder of .md and .txt files.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    budget: Budget = None,
    ratio: Ratio = None,
    top_k: Annotated[int, typer.Option(help="Passages to retrieve.")] = 5,
    mode: ModeOption = "auto",
    allocator: Allocator = "dast",
    prior: PriorOption = "retriever",
    model: Model = EMBEDDED,
    adapter: Adapter = EMBEDDED,
    calibration: CalibrationFile = None,
    embedder: EmbedderName = EMBEDDED,
    index: IndexFolder = None,
    store: StoreFolder = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Retrieve passages of a folder, compress them for the question, and answer it."""
    from ctxcompress.embedder import Embedder
    from ctxcompress.retrieval import FolderIndex

    with _reported():
        check_target(budget, ratio)
        dast = DASTConfig(prior=one_of("prior", prior, Prior))
        with _progress() as report:
            found = FolderIndex.open(folder, Embedder(embedder), index_folder=index, progress=report)
            compressor = _loaded(
                report, model, calibration, seed, found.embedder, dast, adapter, _store(folder, index, store)
            )
            started = time.perf_counter()
            documents = found.retrieve(question, top_k)
            retrieved = time.perf_counter() - started
            result = compressor.compress(
                documents,
                question,
                budget=budget,
                compression_ratio=ratio,
                mode=one_of("mode", mode, Mode),
                allocator=one_of("allocator", allocator, AllocatorName),
                progress=report,
            )
            report("answering", 0, 1)
            answer = compressor.answer(result, max_new_tokens=max_new_tokens)
            report("answering", 1, 1)
        if as_json:
            account = result.to_dict()
            _print_json(
                {"answer": answer.text, **account, "seconds": {"retrieve": retrieved, **answer.seconds}}
            )
        else:
            output.print(answer.text, markup=False, highlight=False)
            output.print(_table(result))


@app.command()
def evaluate(
    task: TaskFile,
    rows: Annotated[str, typer.Option(help="Comma-separated: none, full, or mode:allocator.")] = (
        "none,full,text:uniform,text:random,text:bm25,text:embedding,text:dast"
    ),
    ratio: Ratio = None,
    budget: Budget = None,
    ratio_scale: RatioScale = None,
    limit: Limit = None,
    offset: Offset = 0,
    seed: Seed = 0,
    prior: PriorOption = "retriever",
    model: Model = EMBEDDED,
    adapter: Adapter = EMBEDDED,
    calibration: CalibrationFile = None,
    embedder: EmbedderName = EMBEDDED,
    dast_mode: Annotated[str, typer.Option(help="Of DAST: repaired, scaled or paper.")] = "repaired",
    alpha: Annotated[
        float, typer.Option(help="Weight of attention against NLL; for scaled and paper.")
    ] = 0.5,
    ppl_sign: Annotated[int, typer.Option(help="Sign of the NLL: -1 as printed, or 1.")] = -1,
    chunk_tokens: ChunkTokens = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
    batch_size: Annotated[
        int, typer.Option(help="Questions answered at once; with 1 the seconds are what a user waits.")
    ] = 1,
    output_folder: Annotated[
        Path | None, typer.Option("--output", help="Folder of the run; default: ctxcompress-runs/TASK-HASH.")
    ] = None,
    report_folder: Annotated[
        Path | None,
        typer.Option("--report", help="Folder of a page with charts; shows all runs reported there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure answers without documents, with all, and with compressed ones; a stopped run goes on."""
    import torch
    import transformers

    from ctxcompress.calibration import BUDGET_TEMPERATURE
    from ctxcompress.embedder import Embedder
    from ctxcompress.evaluate.report import write_report
    from ctxcompress.evaluate.runner import EvaluationConfig, read_records
    from ctxcompress.evaluate.runner import evaluate as run
    from ctxcompress.evaluate.runs import add_run
    from ctxcompress.tasks import read_task

    with _reported():
        questions = read_task(task, limit=limit, offset=offset)
        dast = DASTConfig(
            mode=one_of("dast mode", dast_mode, DASTMode),
            alpha=alpha,
            ppl_sign=one_of("ppl_sign", ppl_sign, Literal[-1, 1]),
            prior=one_of("prior", prior, Prior),
        )
        with _progress() as report:
            compressor = _loaded(
                report, model, calibration, seed, Embedder(embedder), dast, adapter, None, chunk_tokens
            )
            wanted = tuple(row.strip() for row in rows.split(",") if row.strip())
            soft = any(row.startswith("soft:") for row in wanted)
            calibrated = compressor.dast.calibration
            config = EvaluationConfig(
                task=task.name,
                task_sha256=hashlib.sha256(task.read_bytes()).hexdigest(),
                model=model,
                rows=wanted,
                ratio=ratio,
                budget=budget,
                ratio_scale=ratio_scale,
                limit=limit,
                offset=offset,
                seed=seed,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                settings={
                    "dast": to_dict(dast),
                    "dac": to_dict(DACConfig()),
                    "calibration": calibrated.settings,
                    "soft_calibration": compressor.soft_dast.calibration.settings if soft else None,
                    "budget_temperature": BUDGET_TEMPERATURE,
                    "adapter": compressor.soft.fingerprint if soft else None,
                    "chunk_tokens": compressor.indexer.chunk_tokens if soft else None,
                    "embedder": embedder,
                    "dtype": str(compressor.backbone.model.dtype),
                    "versions": {
                        "ctxcompress": __version__,
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                    },
                },
            )
            home = output_folder or Path("ctxcompress-runs") / config.name
            results = run(compressor, questions, config, home, report)
        if report_folder is not None:
            add_run(report_folder, results, read_records(home))
            page = write_report(report_folder)
            errors.print(f"report: {page}", markup=False, highlight=False)
        if as_json:
            _print_json(results)
        else:
            output.print(_figures(results["rows"]))


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="The recipe, a TOML file.")],
    as_json: AsJson = False,
) -> None:
    """Train soft-token adapters by a recipe, or go on after the newest checkpoint of its output folder."""
    from ctxcompress.train.loop import train as run
    from ctxcompress.train.recipe import Recipe

    with _reported():
        recipe = Recipe.read(config)
        with _progress() as report:
            compressor = run(recipe, report)
        adapter = str(Path(recipe.output) / "adapter")
        if as_json:
            _print_json({"adapter": adapter, "fingerprint": compressor.fingerprint, "steps": recipe.steps})
        else:
            output.print(f"{recipe.steps} steps -> {adapter}", markup=False, highlight=False)


@app.command()
def card(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of its evaluation runs, with text and soft rows.")
    ],
) -> None:
    """Write what evaluation runs measured into an adapter's card, where `--mode auto` looks."""
    from ctxcompress.checkpoint import annotate, describe
    from ctxcompress.evaluate.measured import measured_modes, measured_rows

    with _reported():
        results = [json.loads(read_text(run / "results.json")) for run in runs]
        measured = measured_modes(results)
        annotate(adapter, measured, measured_rows(results, describe(adapter)["fingerprint"]))
        output.print(f"{len(measured)} ratios -> {adapter / 'README.md'}", markup=False, highlight=False)


@app.command()
def export(
    folder: Annotated[
        Path,
        typer.Argument(file_okay=False, help="Where to write it; files of the same names are replaced."),
    ],
    adapter: Adapter = EMBEDDED,
    model: Model = EMBEDDED,
    as_json: AsJson = False,
) -> None:
    """Write an adapter's decoder as a plain Hugging Face model, to be served by vLLM."""
    from ctxcompress.foreign import export_merged

    with _reported():
        with _progress() as report:
            soft = _loaded(report, model, None, 0, adapter=adapter).soft
            export_merged(soft, folder)
        if as_json:
            _print_json({"folder": str(folder), "fingerprint": soft.fingerprint})
        else:
            reads = f"reads soft tokens of {soft.fingerprint}"
            output.print(f"decoder ({reads}) -> {folder}", markup=False, highlight=False)


@app.command()
def synthesize(
    texts: Annotated[list[str], typer.Argument(help='Files of texts, {"text"} a line: .jsonl or .jsonl.xz.')],
    output_file: Annotated[Path, typer.Option("--output", help="JSON lines, appended to.")],
    endpoint: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server, up to /v1.")],
    teacher: Annotated[str, typer.Option(help="Name of the teacher on that server.")],
    requests_per_minute: Annotated[float | None, typer.Option(help="Most requests a minute.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at the same time.")] = 8,
    model: Model = EMBEDDED,
) -> None:
    """Ask a teacher for the shortest summary of each text: labels for the ratio head; what is there stays."""
    from ctxcompress.backbone import Backbone
    from ctxcompress.train.data import read_lines
    from ctxcompress.train.synthesize import synthesize as ask_teacher

    with _reported(), _progress() as report:
        count = Backbone.from_pretrained(model).count
        records = (record for file in texts for record in read_lines(file, "text"))
        added = ask_teacher(
            records,
            output_file,
            endpoint=endpoint,
            model=teacher,
            count=count,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            progress=report,
        )
        output.print(f"{added} texts -> {output_file}", markup=False, highlight=False)


@app.command()
def fit_ratio_head(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter; its ratio head is replaced.")],
    texts: Annotated[
        list[str], typer.Argument(help='Files of texts; with "log2_ratio" a line if a teacher said.')
    ],
    limit: Annotated[int | None, typer.Option(help="Texts to read.")] = 2000,
    tokens: Annotated[int, typer.Option(help="Longest piece of a text that is judged, in tokens.")] = 48,
    tolerance: Annotated[float, typer.Option(help="Loss a label allows, in nats per token.")] = 0.5,
    notice: Annotated[str, typer.Option(help="Sources and licences of the texts, for the model card.")] = "",
    model: Model = EMBEDDED,
    as_json: AsJson = False,
) -> None:
    """Fit the head that predicts a text's ratio: to a teacher's labels, else to the adapter's own losses."""
    from ctxcompress import checkpoint
    from ctxcompress.backbone import Backbone
    from ctxcompress.train.data import read_lines
    from ctxcompress.train.labels import compressibility, cut
    from ctxcompress.train.labels import fit_ratio_head as fit

    with _reported(), _progress() as report:
        base = Backbone.from_pretrained(model)
        compressor = checkpoint.load(base, adapter)
        described = checkpoint.describe(Path(adapter))
        records = [record for file in texts for record in read_lines(file, "text")][:limit]
        ids = [base.encode(record["text"][: 8 * compressor.window]).ids for record in records]
        if all("log2_ratio" in record for record in records):
            labels = [float(record["log2_ratio"]) for record in records]
            said = "a teacher's"
        else:
            labels = compressibility(compressor, ids, tolerance=tolerance, tokens=tokens, progress=report)
            ids = cut(ids, tokens)
            said = (
                f"largest ratio at which repeating {tokens} tokens costs at most {tolerance:g} nats a token "
                "more than at the finest"
            )
        figures = fit(compressor, ids, labels)
        checkpoint.save(
            compressor,
            adapter,
            dtype=checkpoint.stored_dtype(adapter),
            training=described["training"],
            measured=described["measured"],
            ratio_head={**figures, "labels": said, "notice": notice},
        )
    if as_json:
        _print_json(figures)
    else:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        output.print(shown, markup=False, highlight=False)


@app.command()
def calibrate(
    task: TaskFile,
    output_file: Annotated[Path, typer.Option("--output", help="JSON file to write.")] = Path(
        "calibration.json"
    ),
    limit: Limit = 300,
    offset: Offset = 0,
    mode: Annotated[str, typer.Option(help="What is read: text, or an adapter's soft tokens.")] = "text",
    model: Model = EMBEDDED,
    adapter: Adapter = EMBEDDED,
    embedder: EmbedderName = EMBEDDED,
    as_json: AsJson = False,
) -> None:
    """Find a model's retrieval heads on questions with known gold documents, and fit how much they count.

    For soft mode write to ADAPTER/calibration.json: there it is looked for.
    """
    from ctxcompress.calibration import calibrate as fit
    from ctxcompress.embedder import Embedder
    from ctxcompress.evaluate.signals import observe
    from ctxcompress.tasks import read_task

    with _reported():
        questions = read_task(task, limit=limit, offset=offset)
        with _progress() as report:
            soft = one_of("mode", mode, _FixedMode) == "soft"
            compressor = _loaded(report, model, None, 0, Embedder(embedder), adapter=adapter)
            observations = list(observe(compressor, questions, report, soft=soft))
            provenance = {
                "model": model,
                "mode": mode,
                "task": task.name,
                "offset": offset,
                "limit": limit,
                "embedder": embedder,
            }
            fitted = fit(observations, provenance)
        fitted.save(output_file)
        if as_json:
            _print_json(
                {
                    "output": str(output_file),
                    "heads": [list(head) for head in fitted.heads],
                    **fitted.provenance,
                }
            )
        else:
            first = ", ".join(
                f"{name} {share:.1%}" for name, share in fitted.provenance["gold_first"].items()
            )
            output.print(f"{len(fitted.heads)} heads from {len(observations)} questions -> {output_file}")
            output.print(f"gold document first on the same questions: {first}")


@app.command("index")
def index_folder(
    folder: Annotated[Path, typer.Argument(help="Folder of .md and .txt files.")],
    store: StoreFolder = None,
    index: IndexFolder = None,
    with_nll: Annotated[
        bool, typer.Option("--nll", help="Also what DAST's paper and scaled modes weigh; one more pass.")
    ] = False,
    chunk_tokens: ChunkTokens = None,
    model: Model = EMBEDDED,
    adapter: Adapter = EMBEDDED,
    embedder: EmbedderName = EMBEDDED,
    as_json: AsJson = False,
) -> None:
    """Encode the passages of a folder ahead of all questions; what the store holds is not encoded again."""
    from ctxcompress.embedder import Embedder
    from ctxcompress.retrieval import FolderIndex

    with _reported():
        started = time.perf_counter()
        with _progress() as report:
            found = FolderIndex.open(folder, Embedder(embedder), index_folder=index, progress=report)
            compressor = _loaded(
                report,
                model,
                None,
                0,
                found.embedder,
                None,
                adapter,
                _store(folder, index, store),
                chunk_tokens,
            )
            texts = list(dict.fromkeys(passage.text for passage in found.passages))
            encoded = compressor.index(texts, with_nll=with_nll, progress=report)
        figures = {
            "store": str(_store(folder, index, store)),
            "passages": len(texts),
            "encoded": encoded,
            "seconds": time.perf_counter() - started,
        }
        if as_json:
            _print_json(figures)
        else:
            done = f"{encoded} of {len(texts)} passages encoded in {figures['seconds']:.1f} s"
            output.print(f"{done} -> {figures['store']}", markup=False, highlight=False)


@bench_app.command("query")
def bench_query(
    documents: Annotated[str, typer.Option(help="Numbers of documents, separated by commas.")] = "10,40",
    ratio: Annotated[float, typer.Option(help="Compression ratio of the soft rows.")] = 8.0,
    tokens: Annotated[int, typer.Option(help="Tokens of each document.")] = 150,
    repetitions: Annotated[int, typer.Option(help="Runs of each row; the table has their medians.")] = 5,
    model: Model = EMBEDDED,
    adapter: Adapter = EMBEDDED,
    as_json: AsJson = False,
) -> None:
    """Time the first token: full text against soft tokens from the store, uniform and by DAST."""
    from ctxcompress.evaluate.bench import bench_queries

    with _reported():
        counts = [int(count) for count in documents.split(",") if count.strip().isdecimal()]
        if not counts or min(counts) < 1:
            raise InputError(f"--documents must be numbers like 10,40, got {documents!r}")
        with _progress() as report:
            compressor = _loaded(report, model, None, 0, adapter=adapter)
            rows = bench_queries(
                compressor,
                counts,
                compression_ratio=ratio,
                tokens=tokens,
                repetitions=repetitions,
                progress=report,
            )
        if as_json:
            _print_json({"ratio": ratio, "repetitions": repetitions, "rows": rows})
        else:
            output.print(_bench_table(rows, ratio))


def _bench_table(rows: list[dict[str, Any]], ratio: float) -> Table:
    table = Table(title=f"seconds to the first token, medians; soft tokens at {ratio:g}x from the store")
    for name in ("documents", "tokens", "full", "uniform", "dast", "dast's own", "dast sooner", "own / full"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["documents"]),
            f"{row['tokens']:,}",
            *(f"{row[f'seconds_{name}']:.3f}" for name in ("full", "uniform", "dast", "dast_own")),
            f"{row['sooner_dast']:.1f}x",
            f"{row['dast_own_of_full']:.1%}",
        )
    return table


def _store(folder: Path, index: Path | None, store: Path | None) -> Path:
    """Where soft tokens of a folder's passages are kept: beside the index, unless told otherwise."""
    from ctxcompress.retrieval import INDEX_FOLDER

    return store or (index or folder / INDEX_FOLDER) / "store"


OfStore = Annotated[Path, typer.Argument(help="Folder of a store: the one with store.sqlite in it.")]


@store_app.command("ls")
def store_ls(folder: OfStore, as_json: AsJson = False) -> None:
    """List what a store holds, by the compressor that encoded it; with --json every document."""
    from ctxcompress.store import SoftTokenStore

    with _reported():
        with SoftTokenStore(folder, readonly=True) as store:
            entries = store.entries()
        compressors: dict[str, dict[str, int]] = {}
        for entry in entries:
            sums = compressors.setdefault(entry.fingerprint, {"entries": 0, "tokens": 0, "bytes": 0})
            for name, value in (("entries", 1), ("tokens", entry.tokens), ("bytes", entry.bytes)):
                sums[name] += value
        if as_json:
            _print_json(
                {"compressors": compressors, "entries": [dataclasses.asdict(entry) for entry in entries]}
            )
            return
        table = Table(title=str(folder))
        table.add_column("compressor")
        for name in ("entries", "tokens", "bytes"):
            table.add_column(name, justify="right")
        for fingerprint, sums in compressors.items():
            table.add_row(fingerprint, *(f"{value:,}" for value in sums.values()))
        output.print(table)


@store_app.command("verify")
def store_verify(folder: OfStore, as_json: AsJson = False) -> None:
    """Read every document of a store; damaged ones are set aside and named, and the exit code is 1."""
    from ctxcompress.store import SoftTokenStore

    with _reported():
        SoftTokenStore(folder, readonly=True).close()  # a folder without a store gets none
        with SoftTokenStore(folder) as store, _progress() as report:
            count = len(store)
            damaged = store.verify(report)
        if as_json:
            _print_json({"entries": count, "damaged": damaged})
        else:
            output.print("\n".join([*damaged, f"{count} entries, {len(damaged)} damaged"]), markup=False)
        if damaged:
            raise typer.Exit(1)


@store_app.command("gc")
def store_gc(
    folder: OfStore,
    keep: Annotated[
        list[str] | None, typer.Option(help="Compressor whose documents stay, again for more; default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Free space: drop documents of other compressors, damaged ones and leftover files; merge small files."""
    from ctxcompress.store import SoftTokenStore

    with _reported():
        SoftTokenStore(folder, readonly=True).close()
        with SoftTokenStore(folder) as store:
            figures = store.gc(keep=keep or None)
        if as_json:
            _print_json(dataclasses.asdict(figures))
        else:
            output.print(
                f"{figures.removed} entries removed, "
                f"{figures.bytes_before:,} -> {figures.bytes_after:,} bytes of documents",
                highlight=False,
            )


def _version(asked: bool) -> None:
    if asked:
        output.print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress retrieved context: every document gets the tokens it is worth for the question."""


def _loaded(
    report: _Report,
    model: str,
    calibration: Path | None,
    seed: int,
    embedder: Embedder | None = None,
    dast: DASTConfig | None = None,
    adapter: str = EMBEDDED,
    store: Path | None = None,
    chunk_tokens: int | None = None,
) -> ContextCompressor:
    """The compressor a command works with."""
    report("loading the model", 0, 1)
    from ctxcompress.pipeline import ContextCompressor

    compressor = ContextCompressor.from_pretrained(
        model,
        calibration=calibration,
        seed=seed,
        embedder=embedder,
        dast=dast,
        adapter=adapter,
        store=store,
        chunk_tokens=chunk_tokens,
    )
    report("loading the model", 1, 1)
    return compressor


class _Report:
    """A progress bar per kind of work, made when the work is first heard of."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, work: str, done: int, total: int) -> None:
        if work not in self._tasks:
            self._tasks[work] = self._bars.add_task(work)
        self._bars.update(self._tasks[work], completed=done, total=total)


@contextmanager
def _progress() -> Iterator[_Report]:
    import transformers

    # Other libraries' bars and advice would run through ours.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        yield _Report(bars)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors of ours end the program with their message; all others are defects and keep their traceback."""
    try:
        yield
    except CtxCompressError as error:
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _read(name: str) -> str:
    return decoded(sys.stdin.buffer.read(), "standard input") if name == "-" else read_text(Path(name))


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _table(result: CompressionResult) -> Table:
    ratio = f"{result.compression_ratio:.2f}x" if result.compression_ratio else "nothing left"
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in result.seconds.items())
    tokens = f"{result.tokens_before:,} -> {result.tokens_after:,} tokens ({ratio}, budget {result.budget:,})"
    table = Table(title=f"{result.mode}:{result.allocator}  {tokens}  {seconds}")
    table.add_column("document", overflow="fold")
    for name in ("tokens before", "tokens after", "ratio", "score", "share", "rank"):
        table.add_column(name, justify="right")
    for document in result.documents:
        table.add_row(document.id, *_cells(document))
    return table


def _cells(document: CompressedDocument) -> list[str]:
    return [
        f"{document.tokens_before:,}",
        f"{document.tokens_after:,}",
        "-" if document.ratio is None else f"{document.ratio:.1f}x",
        "-" if document.score is None else f"{document.score:.3f}",
        "-" if document.share is None else f"{document.share:.1%}",
        "-" if document.rank is None else str(document.rank),
    ]


def _figures(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="95 % bootstrap intervals in brackets; times include scoring, pruning and answering")
    names = (
        "row",
        "n",
        "accuracy",
        "f1",
        "normalised",
        "ratio",
        "tokens",
        "gold tokens",
        "gold first",
        "seconds",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "row" else "right")
    for row in rows:
        low, high = row["accuracy_ci"]
        table.add_row(
            row["row"],
            str(row["n"]),
            f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]".replace("[", r"\["),
            f"{row['f1']:.3f}",
            "-" if row["normalised"] is None else f"{row['normalised']:.2f}",
            "-" if row["ratio_achieved"] is None else f"{row['ratio_achieved']:.2f}x",
            f"{row['tokens_mean']:.0f}",
            f"{row['gold_tokens_mean']:.0f}",
            "-" if row["gold_first"] is None else f"{row['gold_first']:.1%}",
            f"{row['seconds_mean']:.2f}",
        )
    return table
