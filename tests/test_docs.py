"""What the documents show is what happens: code blocks run, printed output matches."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"```python\n(.*?)```\n+```text\n(.*?)```", re.DOTALL)
RUNNABLE = [page for page in PAGES if SHOWN.search(page.read_text())]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A user's environment: a new folder, none of the tests' settings."""
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_code_on_a_page_prints_what_the_page_shows(page, fresh):
    blocks = SHOWN.findall(page.read_text())
    code = "".join(code + "print('---')\n" for code, _ in blocks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed = [part.strip() for part in done.stdout.split("---\n")]
    assert printed == [*(shown.strip() for _, shown in blocks), ""]


def minilm_rows(results):
    for row in results["rows"]:
        start = f"| {row['bound']:g} | {row['eps0']:g} |"
        if (found := row["found"]) is None:
            yield f"{start} cannot be met | | | |"
        else:
            at_bound = found[f"bits_per_weight_at_{row['bound']:g}"]
            yield (
                f"{start} {found['bits_per_weight']:.2f} | {at_bound:.2f} | "
                f"{found['evaluation_deviation']:.4f} | {found['wordsim353_compressed']:.3f} |"
            )


def vgg_rows(results):
    for row in results["rows"]:
        before, after = (100 * row[name][0] for name in ("accuracy_before", "accuracy_after"))
        yield (
            f"| {row['name']} | {row['eps0']:g} | {row['bytes']:,} | {row['ratio']:.1f} | "
            f"{row['test_deviation']:.4f} | {before:.1f} to {after:.1f} |"
        )


def rans_rows(results):
    for row in results["coders"]:
        yield (
            f"| {row['entropy']:.1f} | {row['coder']} | {100 * row['size_over_entropy'] - 100:.1f} "
            f"| {row['encode_over_constriction']:.2f} | {row['decode_over_constriction']:.2f} |"
        )


def aciq_rows(results):
    judged = {"resnet": "accuracy", "efficientnet": "agreement"}
    for model, name in judged.items():
        for row in results[model]["rows"]:
            share = (
                f"{100 * row[name]:.1f} ± {100 * row['standard_error']:.1f}" if name in row else ""
            )
            if row["name"] == "float":
                yield f"| {model} | | float | | | {share} |"
            else:
                yield (
                    f"| {model} | {row['setting']} | {row['widths']} {row['name']} | "
                    f"{row['sqnr_db']:.2f} | {row['kl']:.4f} | {share} |"
                )


def aciq_minilm_rows(results):
    for row in results["minilm"]["rows"]:
        if "deviation" in row:
            yield (
                f"| {row['setting']} | {row['name']} | {row['deviation']:.3f} | "
                f"{row['wordsim353']:.3f} |"
            )


def part(results, name):
    """Rows of one part of LAPQ's results; none if it was not measured."""
    return results.get(name, {"rows": []})["rows"]


def percent(row, name):
    return f"{100 * row[name]:.1f} ± {100 * row['standard_error']:.1f}"


def lapq_resnet_rows(results):
    for row in part(results, "resnet"):
        if row["name"] == "float":
            yield f"| | float | | | | {percent(row, 'accuracy')} |"
        else:
            yield (
                f"| {row['widths']} | {row['name']} | {row['held_out']:.4f} | {row['loss']:.4f} | "
                f"{row['cost']:.0f} | {percent(row, 'accuracy')} |"
            )


def lapq_ablation_rows(results):
    for row in part(results, "ablation"):
        yield (
            f"| {row['widths']} | {row['setting']} | {row['name']} | {row['loss']:.4f} | "
            f"{row['held_out']:.4f} | {percent(row, 'accuracy')} |"
        )


def lapq_race_rows(results):
    for model, name in (("ResNet", "scipy"), ("EfficientNet", "efficientnet")):
        for row in (row for row in part(results, name) if "evaluations" in row):
            over = ""
            if "cost_ratio" in row:
                ratios = row["cost_ratio"], row["seconds_ratio"]
                over = "{:.1f}; {:.1f}".format(*ratios) if all(ratios) else "not reached"
            yield (
                f"| {model}, {row['widths']} | {row['name']} | {row['evaluations']:.0f} | "
                f"{row['seconds']:.0f} | {row['start']:.4f} | {row['loss']:.4f} | {over} |"
            )


def lapq_modes_rows(results):
    for row in part(results, "modes"):
        if "cost" in row:
            losses = ", ".join(f"{cost:.0f}: {loss:.3f}" for cost, loss in row["trace"])
            yield f"| {row['name']} | {losses} | {row['held_out']:.3f} | {row['seconds']:.0f} |"


def lapq_efficientnet_rows(results):
    for row in (row for row in part(results, "efficientnet") if "agreement" in row):
        yield (
            f"| {row['name']} | {row['loss']:.3f} | {row['held_out']:.3f} | "
            f"{row['evaluation_kl']:.3f} | {row['cost']:.0f} | {percent(row, 'agreement')} |"
        )


def lapq_channels_rows(results):
    for row in part(results, "channels"):
        yield (
            f"| {row['widths']} | {row['name']} | {row['loss']:.2f} | {row['held_out']:.2f} | "
            f"{row['evaluation_kl']:.2f} | {row['cost']:.0f} | {percent(row, 'agreement')} |"
        )


def calibration_rows(results):
    rows = {(row["name"], row["images"]): row for row in part(results, "calibration")}
    counts = list(dict.fromkeys(count for _, count in rows))
    for name in dict.fromkeys(name for name, _ in rows):
        cells = [f"{rows[name, count]['kl']:.4f}" for count in counts]
        yield f"| {name} | {' | '.join(cells)} |"


WIDTHS = "W4A4", "W4A8", "W3A8", "W2A8"


def by_widths(rows):
    """The float model first, then by width; methods stay in their order."""
    return sorted(rows, key=lambda row: WIDTHS.index(row["widths"]) if "widths" in row else -1)


def adaquant_rows(results):
    for model, judged in (("resnet", "accuracy"), ("efficientnet", "agreement")):
        for row in by_widths(part(results, model)):
            if row["name"] == "float":
                yield f"| {model} | | float | | | {percent(row, judged)} |"
            else:
                fitted = f"{row['calibration_kl']:.4f}" if "calibration_kl" in row else ""
                yield (
                    f"| {model} | {row['widths']} | {row['name']} | {fitted} | {row['kl']:.4f} | "
                    f"{percent(row, judged)} |"
                )


def encoder_rows(results):
    for row in by_widths(part(results, "encoder")):
        yield (
            f"| {row.get('widths', '')} | {row['name']} | {row['deviation']:.3f} | "
            f"{row['wordsim353']:.3f} |"
        )


ATTENTIONS = "softmax, jax.nn", "LLN", "LLN+Diag"


def attention_rows(results):
    rows = {(r["length"], r["pass"], r["name"]): r for r in part(results, "lengths")}
    for length, way in dict.fromkeys(key[:2] for key in rows):
        cells = []
        for name in (*ATTENTIONS, *(f"{name}, causal" for name in ATTENTIONS)):
            row = rows.get((length, way, name), {})
            cells.append(
                f"{1e3 * row['seconds']:,.0f} ({row['bytes'] / 1e6:,.0f})"
                if "seconds" in row
                else ""
            )
        yield f"| {length} | {way} | {' | '.join(cells)} |"


def decode_rows(results):
    for row in part(results, "decode"):
        yield (
            f"| {row['length']:,} | {row['name']} | {1e3 * row['seconds']:.3g} | "
            f"{row['bytes'] / 1e6:.1f} | {row['operations'] / 1e6:.1f} |"
        )


def convert_rows(results):
    for row in results["rows"]:  # the first is softmax itself
        yield (
            f"| {row['name']} | {row['stage']} | {row.get('stats', '')} | "
            f"{row.get('constants', '')} | {row['deviation']:.3f} | {row['wordsim353']:.3f} |"
        )


def training_rows(results):
    judged = {"images": ("accuracy", 100), "plays": ("loss", 1), "reviews": ("accuracy", 100)}
    rows = {task: list(part(results, task)) for task in judged}
    for name in dict.fromkeys(row["name"] for row in rows["images"]):
        cells = []
        for task, (measure, unit) in judged.items():
            found = [unit * row[measure] for row in rows[task] if row["name"] == name]
            digits = 1 if unit == 100 else 3
            cells.append(f"{mean(found):.{digits}f} ± {stdev(found):.{digits}f}")
        yield f"| {name} | {' | '.join(cells)} |"


def additivity_rows(results):
    for row in part(results, "additivity"):
        yield f"| {row['rank_correlation']:.3f} | {row['median_ratio']:.2f} |"


def repairs_rows(results):
    for row in part(results, "repairs"):
        yield (
            f"| {row['widths']} | {row['name']} | {row['kl']:.4f} | {percent(row, 'accuracy')} |"
        )


def curve_rows(results):
    for row in [*part(results, "light"), *part(results, "advanced")[1:]]:
        if row["name"] == "float":
            yield f"| float | 100 | 100 | | | {percent(row, 'accuracy')} |"
        else:
            yield (
                f"| {row['name']} | {100 * row['fraction']:.1f} | "
                f"{100 * row['paper_fraction']:.1f} | {row['widths']} | {row['kl']:.4f} | "
                f"{percent(row, 'accuracy')} |"
            )


def curve_efficientnet_rows(results):
    parts = (part(results, f"{name}_efficientnet") for name in ("light", "advanced"))
    for row in (row for rows in parts for row in rows if row["name"] != "float"):
        yield (
            f"| {row['name']} | {100 * row['fraction']:.1f} | {100 * row['paper_fraction']:.1f} | "
            f"{row['kl']:.3f} | {percent(row, 'agreement')} |"
        )


def recommender_rows(results):
    for row in results["rows"]:
        cost = f"{row['cost']:.0f}" if "cost" in row else ""
        rate = "{:.1f} ± {:.1f}".format(*(100 * x for x in row["hit_rate"]))
        change = "{:+.1f} ± {:.1f}".format(*(100 * x for x in row["change"]))
        yield (
            f"| {row['setting']} | {row['name']} | {cost} | {row['calib_loss']:.4f} | "
            f"{row['held_out_loss']:.4f} | {rate} | {change if row['name'] else ''} | "
            f"{row['bytes']:,.0f} |"
        )


def landscape_rows(results):
    for row in part(results, "landscape"):
        share, interaction = row["interaction_share"], row["interaction"]
        error = share / interaction * row["interaction_error"] if interaction else 0.0
        sign = "" if row["curvature_sign"] > 0 else ", negative"
        yield (
            f"| {row['bits']} | {row['loss']:.2g} | {row['trace_of_hessian']:.3g} | "
            f"{row['off_diagonal']:.2f} | {row['largest_coupling']:.2f} | "
            f"{100 * share:.1f} ± {100 * error:.1f} | {row['log_curvature']:.0f}{sign} |"
        )


@pytest.mark.parametrize(
    ("page", "name", "rows"),
    [
        ("riq", "minilm", minilm_rows),
        ("riq", "vgg", vgg_rows),
        ("riq", "rans", rans_rows),
        ("aciq", "aciq", aciq_rows),
        ("aciq", "aciq", aciq_minilm_rows),
        ("lapq", "lapq", lapq_resnet_rows),
        ("lapq", "lapq", lapq_ablation_rows),
        ("lapq", "lapq", lapq_race_rows),
        ("lapq", "lapq", lapq_modes_rows),
        ("lapq", "lapq", lapq_efficientnet_rows),
        ("lapq", "lapq", lapq_channels_rows),
        ("lapq", "recommender", recommender_rows),
        ("landscape", "lapq", landscape_rows),
        ("adaquant", "adaquant", adaquant_rows),
        ("adaquant", "adaquant", encoder_rows),
        ("adaquant", "adaquant", calibration_rows),
        ("pipelines", "pipelines", additivity_rows),
        ("pipelines", "pipelines", curve_rows),
        ("pipelines", "pipelines", curve_efficientnet_rows),
        ("tuning", "pipelines", repairs_rows),
        ("attention", "attention", attention_rows),
        ("attention", "attention", decode_rows),
        ("attention", "convert_minilm", convert_rows),
        ("attention", "training", training_rows),
    ],
)
def test_tables_show_the_committed_results(page, name, rows):
    page = (ROOT / "docs" / f"{page}.md").read_text()
    for row in rows(json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())):
        assert row in page


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("sequential", "parallel"),
        ("constrained", "parallel"),
        ("parallel", "ACIQ"),
        ("parallel", "nearest"),
        ("second order alone", "ACIQ"),
    ],
)
@pytest.mark.parametrize("widths", WIDTHS)
def test_methods_rank_as_the_page_says_over_three_draws(widths, better, worse):
    """By the divergence on calibration images, of the committed results."""
    results = json.loads((ROOT / "docs" / "results" / "adaquant.json").read_text())
    rows = {r["name"]: r for r in part(results, "resnet") if r.get("widths") == widths}
    means = []
    for name in (better, worse):
        seeds = rows[name]["calibration_kl_seeds"]
        assert len(seeds) == 3
        means.append(sum(seeds) / 3)
    assert means[0] < means[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    for link in (link for link in links if "://" not in link):
        assert (page.parent / link).exists(), link


def test_every_public_name_has_its_line_in_the_docs():
    import lnq

    text = "".join(page.read_text() for page in PAGES)
    for name in lnq.__all__:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("quickstart", "bits per weight"),
        ("budget", "times smaller"),
        ("attention", "linear attention after"),
    ],
)
def test_notebooks_run_top_to_bottom(name, shown, fresh):
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert shown in printed
