"""The published experiment, and AutoScheme beside it: `python -m benchmarks.quality.tables MODEL`.

    python -m benchmarks.quality.tables ./Llama-3.1-8B-Instruct --dataset text.jsonl \\
        --add-bos-token --tasks lambada_openai,hellaswag,piqa,winogrande,mmlu --csv tables.csv
    python -m benchmarks.quality.tables demo --sections mx,int

Sections:

    mx          MXFP4 and MXFP8: BF16, pure 4 bits, 4.5, 5, 6; head and tail at 4.5 and 5; bits of
                scales ignored, scales floor/floor (OCP)
    mx-counted  the same budgets with scales counted, so pure MXFP4 is 4.25 bits
    mx-rceil    as mx, scales rceil/rceil
    mx-mixed    as mx, weights floor and activations rceil: what AutoRound meant by MXFP4 until
                December 2025, and so what its published tables were made with
    int         W2A16 and W4A16 (groups of 128) at 3 bits, head, tail, and both pure schemes
    wide        the menu `cpu` at 4.5, 5.25 and 6.25 bits stored, which AutoScheme does not have

mixbits' rows are runs of `python -m mixbits.quantize` (packed, loaded back, scored) that share
one measurement, plainly rounded and without the gate; `--options` adds words to their command
line and makes rows of their own, so that any option can be compared, and `--options default` takes
nothing but the command's defaults, as the rows of `wide` always do:

    --options '' --options default --options '--rounding gptq --gate 32'

The gate has 32 sequences of its own, beside those to calibrate with and those held out.
AutoScheme's rows come from the installed package, with the same tokens and judged by the same
functions (benchmarks/peers/autoscheme.py). Tasks are scored where their data can be had:
`--include-path` has a folder of them, `--lambada FILE` scores LAMBADA from a local jsonl. The mean
accuracy of a row is paired, document by document, with that of the section `mx`'s BF16. Rows go to
the CSV as they are made, and rows that are there are not made again; `--names` makes some only.

`python -m benchmarks.peers.cost` compares what measuring costs, and
`python -m benchmarks.kernels.real_shapes` runs every stage on the shapes of real models; as
sections `cost` and `shapes` they run here too, on models of their own, into CSVs beside this one's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("USE_HUB_KERNELS", "NO")  # no RMSNorm of a hub in transformers

from benchmarks.peers.autoscheme import FIGURES, METERS, Job, add_text_options, run_worker
from benchmarks.tools.records import Records
from benchmarks.tools.runs import average_accuracy, costs, figures, quantize
from benchmarks.tools.text import Text, make_text
from mixbits.report.report import Tasks
from mixbits.report.tables import paired_accuracy, plus_minus

PUBLISHED_TASKS = "lambada_openai,hellaswag,piqa,winogrande,mmlu"
KEY = (
    *("section", "model", "system", "name", "options", "rounding", "iters"),
    *("tasks_asked", "calibration_sha256"),
)
COLUMNS = (
    *KEY,
    *("schemes", "scale_modes", "counted", "asked", "strategy", "bits", "bits_without_scales"),
    *("bytes", *FIGURES, "tasks", "average_acc", "documents"),
    *(f"{stage}_{meter}" for stage in ("measure", "rounding", "all") for meter in METERS),
    *("nsamples", "seqlen", "eval_nsamples", "held_out_sha256", "stages"),
)


DEFAULT = "default"  # in the place of options


@dataclass(frozen=True)
class Configuration:
    """One row of mixbits: a budget, who spends it, and further words of the command line."""

    section: str
    name: str
    bits: float
    schemes: str = "MXFP4,MXFP8"
    strategy: str = "optimal"
    scale_modes: tuple[str, str] = ("floor", "floor")
    count_scales: bool = False
    options: str = ""

    def command(self) -> list[str]:
        """The words that differ between configurations."""
        words = ["--schemes", self.schemes, "--avg-bits", f"{self.bits:g}"]
        words += [] if self.count_scales else ["--ignore-scale-bits"]
        words += ["--strategy", self.strategy]
        if self.options == DEFAULT:
            return words
        words += ["--rounding", "rtn", "--gate", "0"]
        words += ["--weight-scale-mode", self.scale_modes[0]]
        words += ["--act-scale-mode", self.scale_modes[1]]
        return words + shlex.split(self.options)

    def describe(self) -> dict[str, Any]:
        return {
            "schemes": self.schemes,
            "scale_modes": "" if self.options == DEFAULT else "/".join(self.scale_modes),
            "counted": "all" if self.count_scales else "elements",
            "asked": f"{self.bits:g}",
            "strategy": self.strategy,
        }


def _mx(section: str, **common: Any) -> list[Configuration]:
    """Tables 1 to 3 of docs/auto_scheme_acc.md."""
    pure = 4.25 if common.get("count_scales") else 4.0
    rows = [Configuration(section, "pure MXFP4", pure, schemes="MXFP4", **common)]
    for bits in (4.5, 5.0, 6.0):
        rows.append(Configuration(section, f"{bits:g} bits", bits, **common))
    for bits in (4.5, 5.0):
        for strategy in ("head", "tail"):
            name = f"{bits:g} bits, {strategy}"
            rows.append(Configuration(section, name, bits, strategy=strategy, **common))
    return rows


def _int() -> list[Configuration]:
    """Table 4, and what the two schemes give alone."""
    both = "W2A16,W4A16"
    rows = [
        Configuration("int", "pure W2A16", 2.0, schemes="W2A16"),
        Configuration("int", "pure W4A16", 4.0, schemes="W4A16"),
    ]
    for strategy in ("optimal", "head", "tail"):
        name = "3 bits" if strategy == "optimal" else f"3 bits, {strategy}"
        rows.append(Configuration("int", name, 3.0, schemes=both, strategy=strategy))
    return rows


def _wide() -> list[Configuration]:
    """Wider than AutoScheme's menus, at what is stored."""
    budgets = (4.5, 5.25, 6.25)
    rest = {"schemes": "cpu", "count_scales": True, "options": DEFAULT}
    return [Configuration("wide", f"{bits:g} bits", bits, **rest) for bits in budgets]


SECTIONS: dict[str, list[Configuration]] = {
    "mx": [Configuration("mx", "BF16", 16.0, schemes="BF16"), *_mx("mx")],
    "mx-counted": _mx("mx-counted", count_scales=True),
    "mx-rceil": _mx("mx-rceil", scale_modes=("rceil", "rceil")),
    "mx-mixed": _mx("mx-mixed", scale_modes=("floor", "rceil")),
    "int": _int(),
    "wide": _wide(),
}
ALONE = ("cost", "shapes")


class Tables:
    """One model with its tokens, and the CSV that its rows go to."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        counts = args.nsamples, args.eval_nsamples
        self.text: Text = make_text(
            args.model, folder, args.dataset, counts, args.seqlen, args.marker
        )
        self.records = Records(args.csv, COLUMNS, KEY)
        self.tasks = args.tasks.split(",") if args.tasks else []
        self.tasks_at: str | None = args.include_path
        if args.lambada is not None:
            write_lambada(folder / "tasks", args.lambada)
            self.tasks.append("lambada_local")
            self.tasks_at = str(folder / "tasks")

    def _key(self, section: str, system: str, name: str, **rest: Any) -> dict[str, Any]:
        demo = self.args.model == "demo"
        return {
            "section": section,
            "model": "demo" if demo else Path(self.args.model).resolve().name,
            "system": system,
            "name": name,
            "options": "",
            "rounding": "",
            "iters": "",
            "tasks_asked": ",".join(self.tasks),
            "calibration_sha256": self.text.calibration_sha256[:16],
            **rest,
        }

    def _sizes(self) -> dict[str, Any]:
        sizes = {k: getattr(self.args, k) for k in ("nsamples", "seqlen", "eval_nsamples")}
        return {**sizes, "held_out_sha256": self.text.held_out_sha256[:16]}

    def _record(self, key: dict[str, Any], row: dict[str, Any]) -> None:
        self.records.append({**key, **self._sizes(), **row})
        kl = f"{row['kl'] * 1e3:8.1f}" if "kl" in row else ""
        label = f"{key['system']} {key['rounding']} {key['options']}"
        print(f"{key['section']:>10}  {key['name']:<18} {label:<24} {kl}", flush=True)

    # --- mixbits ------------------------------------------------------------------------------

    def _common_words(self) -> list[str]:
        args, text = self.args, self.text
        words = ["--dataset", str(text.dataset), "--eval-dataset", str(text.held_out)]
        for name in ("nsamples", "eval_nsamples", "seqlen", "batch_size"):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        words += ["--device", args.device]
        if self.tasks:
            words += ["--tasks", ",".join(self.tasks)]
            words += ["--include-path", self.tasks_at] if self.tasks_at else []
            words += ["--limit", str(args.limit)] if args.limit else []
        if args.add_bos_token is not None:
            words += ["--add-bos-token" if args.add_bos_token else "--no-add-bos-token"]
        return words

    def _scores(self, config: Configuration) -> Path:
        """The output of a run that measured all schemes of the configuration's section."""
        measuring = re.sub(r"--refine( \d+)?", "", config.options)  # which comes after
        section = [replace(c, options=measuring) for c in SECTIONS[config.section]]
        widest = max(section, key=lambda c: c.schemes.count(","))
        words = f"{widest.schemes} {'-'.join(widest.scale_modes)} {widest.options}"
        out = self.folder / "".join(c if c.isalnum() else "-" for c in words)
        if not out.exists():
            quantize(self.text.model, out, [*self._common_words(), *widest.command()], only=True)
        return out

    def ours(self, config: Configuration) -> None:
        key = self._key(config.section, "mixbits", config.name, options=config.options)
        if self.records.find(**key) is not None:
            return
        words = [*self._common_words(), *config.command()]
        measured = self._scores(config)
        out = self.folder / "packed"
        report = quantize(
            self.text.model, out, [*words, "--scores", str(measured / "scores.json"), "--overwrite"]
        )
        stages = json.loads((measured / "report.json").read_text())["stages"] + report["stages"]
        row = {**config.describe(), **figures(report), **costs(stages)}
        self._record(key, row)

    # --- AutoScheme ---------------------------------------------------------------------------

    def _theirs_key(self, config: Configuration, rounding: str) -> dict[str, Any]:
        iters = str(self.args.iters) if rounding == "tuned" else ""
        return self._key(config.section, "autoscheme", config.name, rounding=rounding, iters=iters)

    def theirs(self, configs: Sequence[Configuration], roundings: Sequence[str]) -> None:
        """Every budget that AutoScheme has to solve; `configs` share schemes and counting."""
        wanted = [(config, rounding) for config in configs for rounding in roundings]
        missing = [w for w in wanted if self.records.find(**self._theirs_key(*w)) is None]
        if not missing:
            return
        first, args = configs[0], self.args
        job = Job(
            self.text.model,
            str(self.text.calibration),
            str(self.text.held_out),
            first.schemes,
            [[config.bits, rounding] for config, rounding in missing],
            list(first.scale_modes),
            ignore_scale_bits=not first.count_scales,
            batch_size=args.batch_size,
            iters=args.iters,
            device=args.device,
            tasks=self.tasks,
            limit=args.limit,
            add_bos_token=args.add_bos_token,
            include_path=self.tasks_at,
        )
        for (config, rounding), result in zip(missing, run_worker(job), strict=True):
            known = {k: v for k, v in result.items() if k in COLUMNS}
            if "tasks" in known:
                known["average_acc"] = average_accuracy(json.loads(known["tasks"]))
            key = self._theirs_key(config, rounding)
            self._record(key, {**config.describe(), "strategy": "", **known})


def write_lambada(folder: Path, data: Path) -> None:
    """A task `lambada_local` for lm-eval, in the wording of lambada_openai, from a local jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"""\
task: lambada_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data.resolve()))}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    (folder / "lambada_local.yaml").write_text(text, encoding="utf-8")


def against(row: dict[str, str], original: dict[str, str] | None) -> str:
    """The mean accuracy's difference to the original's, with its paired interval of 95 %."""
    if original is None or not (row["documents"] and original["documents"]):
        return "-"
    before, after = (Tasks(documents=json.loads(r["documents"])) for r in (original, row))
    pair = paired_accuracy(before, after, list(after.documents))
    return plus_minus(*pair) if pair else "-"


def figures_table(rows: Sequence[dict[str, str]], original: dict[str, str] | None = None) -> str:
    """Markdown: one line per row, KL in 1e-3 nats, accuracies of all tasks with their errors.

    `original` is the row that accuracies are paired with.
    """
    names = sorted({t for r in rows if r["tasks"] for t in json.loads(r["tasks"])})
    heading = ["", "system", "bits", "with scales", "KL, 1e-3 nats", "perplexity", *names]
    heading += ["average", "against BF16, 95 %"] if names else []
    lines = [heading, ["---", "---", *["---:"] * (len(heading) - 2)]]
    for row in rows:
        system = " ".join(filter(None, (row["system"], row["rounding"], row["options"])))
        kl = f"{float(row['kl']) * 1e3:.1f} ± {float(row['kl_stderr']) * 1e3:.1f}"
        bits = [f"{float(row[k]):.3f}" for k in ("bits_without_scales", "bits")]
        cells = [row["name"], system, *bits, kl, f"{float(row['perplexity']):.3f}"]
        tasks = json.loads(row["tasks"]) if row["tasks"] else {}
        for name in names:
            found = tasks.get(name, {})
            shown = f"{found['acc']:.4f} ± {found['acc_stderr']:.4f}" if "acc" in found else "-"
            cells.append(shown)
        if names:
            average = f"{float(row['average_acc']):.4f}" if row["average_acc"] else "-"
            cells += [average, against(row, original)]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cost_lines(rows: Sequence[dict[str, str]]) -> str:
    """What measuring took each system."""
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        row = next(r for r in rows if r["system"] == system)
        lines.append(
            f"{system}: measuring took {row['measure_seconds']} s, "
            f"peak {row['measure_peak_rss_mb']} MB resident"
        )
    return "\n".join(lines)


def _applies(options: str, config: Configuration) -> bool:
    """Whether options may change a row: BF16 leaves nothing to be done, head and tail no plan."""
    choosing = "--refine" in options
    fixed = config.strategy != "optimal" or "," not in config.schemes
    return not options or not (config.schemes == "BF16" or (choosing and fixed))


def run_section(tables: Tables, section: str, options: Sequence[str], peers: list[str]) -> None:
    names = tables.args.names
    configs = [c for c in SECTIONS[section] if not names or c.name in names.split(",")]
    for extra in options:
        for config in configs:
            if _applies(extra, config):
                tables.ours(replace(config, options=config.options or extra))
    mixed = [c for c in configs if "," in c.schemes and c.strategy == "optimal"]
    if mixed:  # a menu by its name has none, nor may --names leave any
        tables.theirs(mixed, peers)


def print_section(tables: Tables, section: str) -> None:
    names = [config.name for config in SECTIONS[section]]
    mine = tables._key(section, "", "")
    rows = [
        row
        for row in tables.records.rows
        if all(row[k] == mine[k] for k in ("section", "model", "tasks_asked", "calibration_sha256"))
    ]
    rows.sort(key=lambda row: names.index(row["name"]))
    original = tables.records.find(**tables._key("mx", "mixbits", "BF16"))
    print(f"\n{section}: {mine['model']}\n\n{figures_table(rows, original)}\n\n{cost_lines(rows)}")


def run_without_model(section: str, args: argparse.Namespace) -> None:
    """`cost` and `shapes`, with their defaults."""
    from benchmarks.kernels import real_shapes
    from benchmarks.peers import cost

    module = {"cost": cost, "shapes": real_shapes}[section]
    module.main(["--csv", str(args.csv.with_name(f"{args.csv.stem}_{section}.csv"))])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.tables")
    add_text_options(parser)
    parser.add_argument("--sections", default="mx,mx-counted,mx-rceil,int")
    parser.add_argument("--options", action="append", default=[], help="words for mixbits.quantize")
    parser.add_argument("--peers", default="plain,opt", help="roundings of AutoScheme, or none")
    parser.add_argument("--iters", type=int, default=200, help="of SignRound (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", help=f"lm-eval tasks; the published: {PUBLISHED_TASKS}")
    parser.add_argument("--include-path", help="folder with lm-eval tasks")
    parser.add_argument("--names", help="rows to make, such as BF16,'4.5 bits' (all of them)")
    parser.add_argument("--lambada", type=Path, help="a jsonl with LAMBADA's texts")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--add-bos-token", action=argparse.BooleanOptionalAction)
    parser.add_argument("--csv", type=Path, default=Path("tables.csv"))
    args = parser.parse_args(argv)
    peers = [] if args.peers == "none" else args.peers.split(",")
    chosen = args.sections.split(",")
    unknown = set(chosen) - {*SECTIONS, *ALONE}
    if unknown:
        parser.error(f"--sections must be among {', '.join((*SECTIONS, *ALONE))}: got {unknown}")
    made = {config.name for section in chosen for config in SECTIONS.get(section, ())}
    if args.names and (none := set(args.names.split(",")) - made):
        parser.error(f"--names must be among {', '.join(sorted(made))}: got {', '.join(none)}")
    for section in (s for s in chosen if s in ALONE):
        run_without_model(section, args)
    sections = [s for s in chosen if s in SECTIONS]
    if not sections:
        return
    with tempfile.TemporaryDirectory() as folder:
        tables = Tables(args, Path(folder))
        for section in sections:
            run_section(tables, section, args.options or [""], peers)
        for section in sections:
            print_section(tables, section)


if __name__ == "__main__":
    main()
