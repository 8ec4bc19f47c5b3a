"""Runs a reproduction: freezes its bars, runs it, judges its rows, writes the report.

What makes a run acceptable (`Report.faults` is empty and `pertoken reproduce` exits 0):
every declared bar has a row, and every bar either holds or its row says why not. Nothing that
was measured is thrown away: a bar without a row becomes a failing row without a figure, and a
report with faults is still written, with an empty `why` where no reason was given, so that the
gap is seen by whoever reads it. The reason is then written into ``REASONS`` of the reproduction
and brought into the report by `refresh_reasons`, without measuring again.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pertoken.catalog import methods, source_tree
from pertoken.errors import PertokenError, nearest
from pertoken.reproduce._bars import Bar, freeze
from pertoken.reproduce._checkpoint import Checkpoint, code_digest
from pertoken.reproduce._context import TINY, Context
from pertoken.reproduce._machine import PACKAGE, machine, versions
from pertoken.reproduce._report import Report, Reproduction, Row, read_report, write_json

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = Path(__file__).resolve().parent
_NOT_REPRODUCTIONS = {"readme"}


def available() -> list[str]:
    """Slugs that have a reproduction, in alphabetical order."""
    stems = (path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    return sorted(stem.replace("_", "-") for stem in stems if stem not in _NOT_REPRODUCTIONS)


def reports_folder() -> Path:
    """Where reports go unless told otherwise: of the source tree, else of the current folder."""
    return (source_tree() or Path.cwd()) / "reports"


def find(slug: str) -> tuple[str, ModuleType]:
    """The slug in its usual spelling and the module of its reproduction.

    Raises PertokenError where there is none, with the nearest slug or what there is.
    """
    usual = slug.strip().lower().replace("_", "-")
    slugs = available()
    if usual in slugs:
        return usual, importlib.import_module(f"pertoken.reproduce.{usual.replace('-', '_')}")
    if usual in _catalogued():
        raise PertokenError(
            f"{usual} has no reproduction yet; there is: {', '.join(slugs) or 'none'}"
        )
    hint = nearest(slug, dict.fromkeys([*slugs, *_catalogued()]))
    raise PertokenError(
        f"no reproduction named {slug!r}{hint}; there is: {', '.join(slugs) or 'none'}"
    )


def reproduce(
    slug: str,
    smoke: bool = False,
    *,
    model: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    data: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    progress: bool = False,
    console: Console | None = None,
) -> Report:
    """Run the reproduction of a paper, judge its bars and write ``reports/<slug>.json``.

    smoke: a tiny random model and one or two prompts, to see that everything runs; nothing is
        judged, and nothing is written unless `out` names another folder than the real reports'.
    model, dtype, seed: over what the reproduction declares.
    data: file or folder with the data; fetched or taken from the cache where not given.
    resume: go on behind the units an interrupted run with the same settings and code finished.
    jobs: processes that share the units which are not timed, of one thread each.

    >>> import pertoken
    >>> report = pertoken.reproduce("goose", smoke=True)  # doctest: +SKIP
    """
    usual, module = find(slug)
    return run_module(
        module,
        usual,
        smoke=smoke,
        model=model,
        dtype=dtype,
        seed=seed,
        device=device,
        data=data,
        out=out,
        resume=resume,
        jobs=jobs,
        progress=progress,
        console=console,
    )


def run_module(
    module: Any,
    slug: str,
    *,
    smoke: bool = False,
    model: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    data: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    helper: int = 0,
    progress: bool = False,
    console: Console | None = None,
) -> Report:
    """Like `reproduce`, for any object with ``BARS`` and ``run(context)``.

    helper: join the run of another process at this call of `remember_all`, see `_jobs`.
    """
    if jobs < 1:
        raise PertokenError(f"--jobs must be 1 or more, got {jobs}")
    bars = freeze(getattr(module, "BARS", None), f"the reproduction of {slug}")
    reasons, caveats = (_told(module, name, bars, slug) for name in ("REASONS", "CAVEATS"))
    context = Context(
        slug=slug,
        version=int(getattr(module, "VERSION", 1)),
        smoke=smoke,
        model=TINY if smoke else str(model or getattr(module, "MODEL", "smollm2")),
        dtype=dtype or getattr(module, "DTYPE", None),
        seed=getattr(module, "SEED", 0) if seed is None else seed,
        device=device,
        data_path=_existing(data),
        out_dir=_folder(out, smoke),
        progress=progress,
        console=console,
        jobs=jobs,
        helper=helper,
    )
    context.job = {
        "module": getattr(module, "__name__", ""),
        "slug": slug,
        "model": model,
        "dtype": dtype,
        "seed": seed,
        "device": device,
        "data": None if data is None else str(data),
    }
    settings = _settings(context)
    checkpoint = None if smoke else _checkpoint(module, context, settings, resume)
    context.checkpoint = checkpoint
    if checkpoint is not None and resume and not helper:
        context.say(f"{slug}: {checkpoint.resumed} finished units found")
    report = _measured(module, context, settings, bars, reasons, caveats)
    if context.out_dir is not None:
        report.path = context.out_dir / f"{slug}.json"
        write_json(report.to_dict(), report.path)
    if checkpoint is not None:
        checkpoint.discard()
    return report


def _measured(
    module: Any,
    context: Context,
    settings: Mapping[str, Any],
    bars: Mapping[str, Bar],
    reasons: Mapping[str, str],
    caveats: Mapping[str, str],
) -> Report:
    """Run the module and judge its rows."""
    started = time.monotonic()
    result = module.run(context)
    if not isinstance(result, Reproduction):
        raise PertokenError(
            f"run(context) of {context.slug} must return context.reproduction(rows, …)"
        )
    rows, faults = judge(result.rows, bars, reasons, caveats, smoke=context.smoke)
    return Report(
        slug=context.slug,
        version=context.version,
        model=result.model,
        settings={**result.settings, **settings, **_found_out(context)},
        seed=result.seed,
        versions=versions(),
        machine=machine(context.device),
        seconds=round(time.monotonic() - started, 1),
        figures=rows,
        faults=faults,
    )


def judge(
    rows: Iterable[Row],
    bars: Mapping[str, Bar],
    reasons: Mapping[str, str],
    caveats: Mapping[str, str],
    *,
    smoke: bool,
) -> tuple[list[Row], list[str]]:
    """The rows with their declared bars applied, and the faults.

    In a smoke run bars are shown but not judged (`holds` stays None).
    """
    judged = list(rows)
    faults = []
    seen: set[str] = set()
    for row in judged:
        if row.metric in seen:
            faults.append(f"two rows are named {row.metric!r}")
        seen.add(row.metric)
    for metric in bars:
        if metric not in seen:
            faults.append(f"BARS declares {metric!r} but no such row was returned")
            judged.append(Row(metric, float("nan")))
    for row in judged:
        bar = bars.get(row.metric)
        if bar is None:
            continue
        row.judge(bar)
        row.caveat = caveats.get(row.metric, "") if row.holds else ""
        if smoke:
            row.holds = None
        elif not row.holds:
            row.why = reasons.get(row.metric, "") or row.why
            if not row.why:
                faults.append(f"{row.metric!r} does not hold and no reason is given")
    return judged, faults


def refresh_reasons(slug: str, out: str | Path | None = None) -> Report:
    """Bring a reproduction's ``REASONS`` and ``CAVEATS`` into its report, without measuring again.

    No figure or bar is touched: a bar or version that was changed since the run is refused.
    """
    usual, module = find(slug)
    folder = reports_folder() if out is None else Path(out)
    report = read_report(folder / f"{usual}.json")
    bars = freeze(getattr(module, "BARS", None), f"the reproduction of {usual}")
    written = {row.metric: row.bar for row in report.figures if row.bar}
    if written != {metric: bar.text for metric, bar in bars.items()}:
        raise PertokenError(f"the bars of {usual} changed since its report was written: run it")
    version = int(getattr(module, "VERSION", 1))
    if report.version != version:
        raise PertokenError(
            f"{usual}'s report is of version {report.version}, its reasons are of version "
            f"{version}: run it"
        )
    told = [_told(module, name, bars, usual) for name in ("REASONS", "CAVEATS")]
    report.figures, report.faults = judge(report.figures, bars, *told, smoke=False)
    write_json(report.to_dict(), folder / f"{usual}.json")
    return report


def _settings(context: Context) -> dict[str, Any]:
    """What the harness itself adds to the settings of a report."""
    return {
        "dtype": context.dtype or "float32",
        "device": context.device,
        "smoke": context.smoke,
        "data": context.data_path.name if context.data_path else "default",
    }


def _found_out(context: Context) -> dict[str, Any]:
    """Settings that are known only after the run: the loaded dtype, units of an earlier run."""
    found: dict[str, Any] = {}
    if context.loaded is not None:
        found["dtype"] = str(context.loaded[0].dtype).removeprefix("torch.")
    if context.checkpoint is not None and context.checkpoint.resumed:
        found["resumed_units"] = context.checkpoint.resumed  # their time is not in `seconds`
    return found


def _checkpoint(
    module: Any, context: Context, settings: Mapping[str, Any], resume: bool
) -> Checkpoint:
    source = Path(getattr(module, "__file__", None) or __file__)
    everything = {
        **settings,
        "model": context.model,
        "seed": context.seed,
        "version": context.version,
        "data": str(context.data_path),
        "code": code_digest(PACKAGE, source),
        "versions": {k: v for k, v in versions().items() if k != "commit"},
    }
    return Checkpoint(
        _cache() / "reproduce", context.slug, everything, resume=resume, helper=bool(context.helper)
    )


def _cache() -> Path:
    from pertoken._fetch import cache_root

    return cache_root()


def _told(module: Any, name: str, bars: Mapping[str, Bar], slug: str) -> dict[str, str]:
    """``REASONS`` or ``CAVEATS`` of a module; PertokenError where one is for no bar."""
    found: dict[str, str] = getattr(module, name, {})
    unknown = [metric for metric in found if metric not in bars]
    if unknown:
        raise PertokenError(
            f"{name} of {slug} names {unknown[0]!r}, which has no bar{nearest(unknown[0], bars)}"
        )
    return dict(found)


def _existing(data: str | Path | None) -> Path | None:
    if data is None:
        return None
    path = Path(data).expanduser()
    if not path.exists():
        raise PertokenError(f"no data at {data}; name a file or folder that exists")
    return path


def _folder(out: str | Path | None, smoke: bool) -> Path | None:
    """The folder to write to, None for none; checked before the run, not hours later."""
    if out is None:
        return None if smoke else reports_folder()
    folder = Path(out).expanduser()
    if smoke and folder.resolve() == reports_folder().resolve():
        raise PertokenError("a smoke run never goes into the real reports: name another --out")
    if folder.exists() and not folder.is_dir():
        raise PertokenError(f"{out} is a file; name a folder to write to")
    return folder


def _catalogued() -> list[str]:
    return [card.slug for card in methods() if card.package == "pertoken"]
