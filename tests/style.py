"""Measure the form of the code: long lines, functions, classes, and how docstrings begin.

    python tests/style.py                       this checkout
    python tests/style.py ../old                another one
    python tests/style.py --beside h11 httpx    installed packages too

Function lengths count source lines without the docstring; tokens are those of Python's tokenizer
without comments, line ends and docstrings. A docstring sentence opens obscurely if its first word
is one of Of, By, What, Who, Whether, That and How.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import re
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG = 100
OBSCURE = {"Of", "By", "What", "Who", "Whether", "That", "How"}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


@dataclass
class Form:
    """The counts of a tree."""

    lines: int = 0
    long_lines: int = 0
    sentences: int = 0
    obscure: int = 0
    function_lines: list[int] = field(default_factory=list)
    function_tokens: list[int] = field(default_factory=list)
    classes: list[tuple[int, int, int, str]] = field(default_factory=list)
    obscure_by_file: dict[str, int] = field(default_factory=dict)


def sentences(docstring: str) -> Iterator[str]:
    """The prose sentences of a docstring: examples, tables and indented blocks are left out."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if not lines or lines[0].lstrip().startswith((">>>", "|")):
            continue
        prose = " ".join(line.strip() for line in lines if not line.strip().startswith(">>>"))
        yield from (part for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z`])", prose) if part)


def without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    body = node.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(body) > 1:
        return body[1:] if isinstance(first.value.value, str) else body
    return body


def tokens(source: str) -> int:
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    try:
        return sum(token.type not in LAYOUT for token in found)
    except (tokenize.TokenError, IndentationError):
        return 0


def measure_function(form: Form, node: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> None:
    body = without_docstring(node)
    lines = text.splitlines()
    signature = lines[node.lineno - 1 : node.body[0].lineno - 1]
    code = lines[body[0].lineno - 1 : node.end_lineno]
    form.function_lines.append(len(signature) + len(code))
    form.function_tokens.append(tokens("\n".join([*signature, *code]) + "\n"))


def measure_class(form: Form, node: ast.ClassDef, path: str) -> None:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    made = next((item for item in methods if item.name == "__init__"), None)
    arguments = len(made.args.args) + len(made.args.kwonlyargs) - 1 if made else 0
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    form.classes.append((length, len(methods), arguments, f"{path}:{node.name}"))


def measure(root: Path, paths: Sequence[Path]) -> Form:
    """Count in the Python files at `paths`, which are named relative to `root`."""
    form = Form()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        form.lines += len(text.splitlines())
        form.long_lines += sum(len(line) > LONG for line in text.splitlines())
        name = str(path.relative_to(root))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                measure_function(form, node, text)
            if isinstance(node, ast.ClassDef):
                measure_class(form, node, name)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found = list(sentences(ast.get_docstring(node) or ""))
                odd = sum(sentence.split()[0].strip("`,:") in OBSCURE for sentence in found)
                form.sentences += len(found)
                form.obscure += odd
                if odd:
                    form.obscure_by_file[name] = form.obscure_by_file.get(name, 0) + odd
    return form


def sources(checkout: Path) -> list[Path]:
    """The package's modules, each once: stream_ctr/connectors is a link to connectors."""
    found = [*(checkout / "stream_ctr").rglob("*.py"), *(checkout / "connectors").rglob("*.py")]
    return sorted(path for path in found if "stream_ctr/connectors/" not in str(path))


def spread(numbers: Sequence[int]) -> str:
    ordered = sorted(numbers)
    ninth = ordered[int(0.9 * (len(ordered) - 1))]
    return f"{statistics.median(ordered):g} / {ninth} / {ordered[-1]}"


def row(name: str, form: Form) -> str:
    share = form.long_lines / max(form.lines, 1)
    obscure = form.obscure / max(form.sentences, 1)
    lines, each = spread(form.function_lines), spread(form.function_tokens)
    return f"| {name} | {form.lines:,} | {share:.1%} | {obscure:.1%} | {lines} | {each} |"


def installed(package: str) -> Form:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed here")
    folder = Path(next(iter(found.submodule_search_locations)))
    paths = [path for path in folder.rglob("*.py") if "tests" not in path.parts]
    return measure(folder, sorted(paths))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--beside", nargs="*", default=[], metavar="PACKAGE")
    parser.add_argument("--files", action="store_true", help="list files with obscure openings")
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    code = measure(checkout, sources(checkout))
    tests = measure(checkout, sorted((checkout / "tests").rglob("*.py")))
    print("| code | lines | over 100 columns | obscure openings | lines of a function | tokens |")
    print("|---|--:|--:|--:|--:|--:|")
    print(row("stream_ctr and connectors", code))
    print(row("tests", tests))
    for package in given.beside:
        print(row(package, installed(package)))
    print("\nFunctions: median / 90th percentile / maximum. The ten longest classes:\n")
    print("| class | lines | methods | constructor arguments |")
    print("|---|--:|--:|--:|")
    for length, methods, arguments, name in sorted(code.classes, reverse=True)[:10]:
        print(f"| {name} | {length} | {methods} | {arguments} |")
    widest = sorted(code.classes, key=lambda each: -each[2])[:5]
    print("\nMost constructor arguments: " + ", ".join(f"{each[3]} {each[2]}" for each in widest))
    if given.files:
        for name, count in sorted({**code.obscure_by_file, **tests.obscure_by_file}.items()):
            print(f"{count:4} {name}")


if __name__ == "__main__":
    main()
