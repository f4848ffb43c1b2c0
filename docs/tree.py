"""Write the list of files in docs/design.md: every source file with the first sentence of its docstring.

python docs/tree.py            # rewrite the list
python docs/tree.py --print
"""

import argparse
import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "design.md"
FOLDERS = ("bestrq2", "kernels", "csrc", "benchmarks")
SOURCES = (".py", ".cpp", ".h", ".cuh", ".cu")
BEGIN, END = "<!-- files: written by docs/tree.py -->\n```text\n", "```\n"


def summary(path: Path) -> str:
    """The first sentence of a Python docstring or of the first C++ comment, without markup; empty if there is none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"((?:\s*//[^\n]*\n)+)", text)
        text = re.sub(r"^\s*//+ ?", "", comment.group(1), flags=re.MULTILINE) if comment else ""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)`\]])(?<!et al)[.;](?:\s|$)", paragraph)[0].rstrip(".:")
    return re.sub(r":\w+:`([^`]*)`", r"\1", sentence).replace("``", "")


def shorten(prefix: str, text: str, columns: int = 120) -> str:
    return (prefix + textwrap.shorten(text, columns - len(prefix), placeholder=" ...")).rstrip()


def lines(folder: Path, indent: str = "") -> list[str]:
    """The files of a folder, then its folders, each level two columns further right."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith((".", "_")) or p.name == "__main__.py")
    files = [p for p in entries if p.is_file() and p.suffix in SOURCES]
    width = max((len(p.name) for p in files), default=0)
    init = folder / "__init__.py"
    head = f"{indent}{folder.name}/"
    found = [shorten(f"{head}  ", summary(init)) if init.exists() else head]
    found += [shorten(f"{indent}  {p.name:{width}}  ", summary(p)) for p in files]
    for child in entries:
        if child.is_dir() and any(p.suffix in SOURCES for p in child.rglob("*")):
            found += lines(child, indent + "  ")
    return found


def tree() -> str:
    return "\n".join(line for folder in FOLDERS for line in lines(ROOT / folder)) + "\n"


def page() -> str:
    """docs/design.md with the present list."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return head + BEGIN + tree() + END + rest.split(END, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the list and change nothing")
    if parser.parse_args().print:
        print(tree(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
