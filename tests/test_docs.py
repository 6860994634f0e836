"""The pages of docs/: code runs, commands and links exist, what is generated is current, the site builds."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.commands import parse
from support.pages_of_docs import PAGES, blocks, command_lines, read
from support.source_tree import ROOT
from support.tones import TINY_FRONT_END, TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")

# ------------------------------------------------------------------------------------------------------------- links


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", link):
            continue
        address, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / address).resolve() if address else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            if target == ROOT / "docs" / "api.md":  # its anchors are names in Python
                continue
            assert anchor in anchors(str(target.relative_to(ROOT))), f"{page}: {link}"


# ---------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_typed(page):
    """Each line of a page that begins with avsep is taken by the command line, up to running it."""
    for line in command_lines(page):
        words = shlex.split(line, comments=True)
        try:
            parse(*(word for word in words[1:] if word != "..."))
        except Exception as error:
            pytest.fail(f"{page}: {line}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # which tells of what was
def test_every_option_in_the_text_exists(page):
    """Of a command in a sentence, which may lack what the command needs."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(avsep [a-z][^`]*)`", text):
        words = [word for word in code.split()[1:] if word != "..."]
        command, own = find_command(words)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", own):
            assert option in known or option in ("--help", "-h"), f"{page}: {code}"


def find_command(words):
    """The innermost command that ``words`` name, and the rest of them."""
    import typer

    from avsep.cli.app import COMMANDS, build_app

    assert words[0] in COMMANDS, words
    command = typer.main.get_command(build_app(words))
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if words and "run" in getattr(command, "commands", {}):  # which export does unless it is told otherwise
        command = command.commands["run"]
    return command, " ".join(words)


# --------------------------------------------------------------------------------------------------------- generated


@pytest.mark.parametrize("name", ["methods", "settings", "commands"])
def test_generated_pages_are_current(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    page = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["page"]()
    assert page == read(f"docs/{name}.md"), f"run python scripts/{name}.py"


def test_every_strategy_and_setting_has_a_line():
    from avsep.registry import STRATEGIES

    methods, settings = read("docs/methods.md"), read("docs/settings.md")
    for spec in STRATEGIES:
        if spec.package == "avsep":
            assert f"| `{spec.name}` |" in methods
            assert f"### `{spec.name}`" in settings
            assert spec.source
    rows = re.findall(
        r"^\| `((?:separator|train|strategy|memory|protocol|blurry|tasks)[\w.]*)`(.*)$", settings, re.MULTILINE
    )
    assert len(rows) > 40
    for name, row in rows:
        assert not re.search(r"\|\s*\|$", row), f"{name} has no description in avsep/spec.py"


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "budget", "figure3", "crosssdc"])
def test_tables_are_those_that_were_measured(table):
    page = read("docs/hypotheses.md" if table == "crosssdc" else "docs/reproduce.md")
    file = ROOT / f"benchmarks/results/reproduce/{table}.md"
    measured = file.read_text(encoding="utf-8") if file.is_file() else "Not run under protocol version 2 yet.\n"
    assert f"<!-- reproduce:{table} -->\n{measured}<!-- /reproduce:{table} -->" in page


# -------------------------------------------------------------------------------------------------------------- site


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_site_is_whole_and_asks_nobody_else(tmp_path):
    """It builds without a warning; no page loads anything from another server."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]+src="?(?:https?:)?//[^>]*', text)
        assert not [t for t in re.findall(r'<link [^>]*href="?(?:https?:)?//[^>]*', text) if "canonical" not in t]
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("separate", "Separation", "ContinualLearner", "BundleSeparator", "extend", "StoreWriter"):
        assert re.search(rf'id="avsep\.[\w.]*\.{name}"', api), name
    assert not re.search(r":(?:func|class|meth|mod):", api)


def test_every_page_is_in_the_sites_menu():
    hooks = read("scripts/site_hooks.py")
    menu = read("mkdocs.yml")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in menu, page.name
    for page in re.findall(r'"[\w/]+\.md": "([\w/]+\.md)"', hooks):
        assert f": {page}\n" in menu, page


# ---------------------------------------------------------------------------------------------------------- notebook


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs(tmp_path):
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "first_hour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "mine" / "run.yaml").is_file()


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(read("docs/first_hour.ipynb"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            compile("".join(cell["source"]), "first_hour.ipynb", "exec")


# -------------------------------------------------------------------------------------------------------------- code


def test_composing():
    scope = {}
    exec(blocks("docs/compose.md", "python")[0], scope)
    assert scope["separator"].num_classes == 5


def test_training(tone_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": TINY_TRAIN}))
    code = next(b for b in blocks("docs/train.md", "python") if "learner.fit" in b)
    for text, stand_in in (
        (
            'task_stream("stores/full")',
            f"task_stream({str(tone_store)!r}, clip_samples={TINY_FRONT_END['clip_samples']})",
        ),
        ('"iquery_small"', '"tiny.yaml"'),
    ):
        assert text in code
        code = code.replace(text, stand_in)
    exec(code, {})
    assert Path("runs/mine/tasks/01/task.json").is_file()


def test_adding_a_method(tone_store, tmp_path):
    """The section's code as an installed package, its commands on a tiny store."""
    code = next(b for b in blocks("docs/extend.md", "python") if "STRATEGIES.register" in b)
    module = tmp_path / re.fullmatch(r"# (\S+)", code.splitlines()[0]).group(1)
    module.parent.mkdir()
    module.write_text(code)
    (module.parent / "__init__.py").touch()
    toml = next(b for b in blocks("docs/extend.md", "toml") if "entry-points" in b)
    group, entry = re.search(r'\[project\.entry-points\."(.+)"\]\n(.+)', toml).groups()
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    train = {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 2, "validation_pairs": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"separator": TINY_SEPARATOR, "train": train}))

    commands = next(b for b in blocks("docs/extend.md", "bash") if "--strategy anchored" in b).splitlines()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "200",
    }
    printed = []
    for command in commands:
        arguments = shlex.split(command.replace("stores/full", shlex.quote(str(tone_store))))
        assert arguments[0] == "avsep"
        if arguments[1] == "train":
            tasks = ";".join(",".join(t) for t in TINY_TASKS)
            arguments += ["--preset", "tiny.yaml", "--memory", "none", "--tasks", tasks, "--device", "cpu"]
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    listed, _ = printed
    assert re.search(r"anchored +Fine-tuning with an L2 pull .* weight=0\.001 +ours \[package my_package\]", listed)
    with open(tmp_path / "runs" / "anchored" / "logs" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["anchor"]) for row in rows] == [False] * 2 + [True] * 2
    assert float(rows[-1]["anchor"]) > 0
    assert yaml.safe_load((tmp_path / "runs" / "anchored" / "run.yaml").read_text())["strategy"] == {
        "name": "anchored",
        "params": {"weight": 0.01},
    }


def test_the_hooks_named_exist():
    from avsep.strategies import Strategy

    text = read("docs/extend.md")
    table = text[text.index("| hook | for |") : text.index("Strategies combine:")]
    named = re.findall(
        r"`(\w+)(?:\(([^)]*)\))?`", "".join(row.split("|")[1] for row in table.splitlines()[2:] if row.startswith("|"))
    )
    assert len(named) > 9
    for name, arguments in named:
        found = getattr(Strategy, name)
        if callable(found):
            assert ", ".join(list(inspect.signature(found).parameters)[1:]) == arguments
    missing = {n for n in vars(Strategy) if not n.startswith("_")} - {name for name, _ in named}
    assert missing == set()
