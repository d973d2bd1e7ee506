"""Gathers the training text of the bundled model from the running interpreter: the standard library's source, its
docstrings and pydoc's topics. Owns what a document is and which split it is in; knows no tokenizer and no model."""

import ast
import gzip
import hashlib
import importlib
import inspect
import json
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

#: Shares of the source files that training never sees. Settings are chosen on validation, figures come from held-out.
HELDOUT_SHARE = 0.08
VALIDATION_SHARE = 0.02

#: Characters in one piece of a module: about 1,700 tokens, which leaves room in the context of 2,048.
MAX_SEGMENT_CHARS = 5500

#: Documents of one function are short, so that the model learns to end one within a usual completion.
MAX_FUNCTION_CHARS = 1500
MIN_FUNCTION_CHARS = 60
MAX_ANSWER_CHARS = 1500

#: One of so many functions in test files becomes a document of its own; all of them would drown the library's.
TEST_FUNCTION_STRIDE = 4

#: Not prose and not hand-written code: the build's configuration names the machine that built the interpreter.
EXCLUDED = re.compile(r"site-packages|__pycache__|(^|/)_sysconfigdata|(^|/)config-3|lib2to3/tests/data|pydoc_data")
TEST_PATH = re.compile(r"(^|/)(test|tests|idle_test)/|(^|/)test_[^/]*$")
DATA_LINE = re.compile(r"""\s*(?:[\d'"({\[\]}),-]|[bru]+['"]|$)""")

#: Modules written in C, which have docstrings and no source here.
C_MODULES = (
    "builtins",
    "math",
    "cmath",
    "itertools",
    "sys",
    "time",
    "array",
    "zlib",
    "binascii",
    "select",
    "posix",
    "gc",
)

SYSTEM_TEXTS = ("You are a helpful assistant.", "You are a Python tutor.", "Answer briefly.", "You write Python.")
QUESTIONS = ("What does `{name}` do?", "Explain `{name}`.", "What is `{name}` in Python?", "Describe `{name}` briefly.")
ORDERS = (
    "Write a Python function `{name}`: {line}",
    "Write a Python function that does this: {line}",
    "Write `{name}` in Python. {line}",
    "Implement this function:\n{head}\n{line}",
)
TOPIC_QUESTIONS = ("Explain {name} in Python.", "What does Python's documentation say about {name}?")


@dataclass(frozen=True)
class Document:
    """One training text. `text` holds plain text; a chat has `messages` instead, rendered by the chat template."""

    split: str
    kind: str
    source: str
    text: str
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class HeldoutFunction:
    """A function of the held-out files and the beginning of it that the model is asked to continue."""

    source: str
    name: str
    prompt: str


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(source: str) -> str:
    share = stable_hash(source) / 2**64
    if share < HELDOUT_SHARE:
        return "heldout"
    return "validation" if share < HELDOUT_SHARE + VALIDATION_SHARE else "train"


def source_files() -> Iterator[tuple[str, str, ast.Module]]:
    """Yields path, text and syntax tree of every standard library module worth learning from, in a fixed order.

    Files that do not parse (the test suite's bad syntax), tables of data and exact copies are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[int] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if EXCLUDED.search(name):
            continue
        try:
            text = path.read_text("utf-8").replace("\r\n", "\n").expandtabs(8)
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        digest = stable_hash(text)
        if not tree.body or digest in seen or is_data_table(text):
            continue
        seen.add(digest)
        yield name, text, tree


def is_data_table(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) > 100 and sum(bool(DATA_LINE.match(line)) for line in lines) > 0.6 * len(lines)


def segments(text: str, tree: ast.Module) -> Iterator[str]:
    """Cuts a module before top-level statements, so that no piece is longer than the context where that is possible."""
    lines = text.splitlines(keepends=True)
    piece: list[str] = []
    starts = {first_line(node) for node in tree.body}
    for number, line in enumerate(lines, start=1):
        size = sum(map(len, piece))
        if (number in starts and size + statement_chars(lines, number, starts) > MAX_SEGMENT_CHARS) or size > 6000:
            yield "".join(piece)
            piece = []
        piece.append(line)
    yield "".join(piece)


def statement_chars(lines: list[str], number: int, starts: set[int]) -> int:
    """Characters from a statement's first line to the next statement, no more than a piece holds."""
    size = 0
    for later in range(number, len(lines) + 1):
        if (later != number and later in starts) or size > MAX_SEGMENT_CHARS:
            break
        size += len(lines[later - 1])
    return min(size, MAX_SEGMENT_CHARS)


def first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def functions(text: str, tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Yields qualified name, node and source (no decorators, moved to column 0) of functions and methods."""
    lines = text.splitlines()
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while scopes:
        prefix, scope = scopes.pop(0)
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.FunctionDef):
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
                if parses(source):
                    yield f"{prefix}{node.name}", node, source


def normalized(source: str) -> str:
    """Writes a function with one statement a line and no comments: a small model has enough to do with the rest."""
    return ast.unparse(ast.parse(source)) + "\n"


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def chat(source: str, question: str, answer: str) -> Document:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    choice = stable_hash(f"{source} {question}")
    if choice % 4 == 0:
        messages.insert(0, {"role": "system", "content": SYSTEM_TEXTS[choice // 4 % len(SYSTEM_TEXTS)]})
    return Document(split_of(source), "chat", source, "", tuple(messages))


def pick(templates: tuple[str, ...], key: str) -> str:
    return templates[stable_hash(key) % len(templates)]


def documentation_chat(source: str, name: str, doc: str | None) -> Iterator[Document]:
    if doc and 20 <= len(doc) <= MAX_ANSWER_CHARS:
        yield chat(source, pick(QUESTIONS, name).format(name=name), doc.strip())


def function_chats(path: str, name: str, node: ast.FunctionDef, source: str) -> Iterator[Document]:
    """Makes the conversations of one library function: its documentation, and the order to write it."""
    doc = ast.get_docstring(node)
    if not doc:
        return
    yield from documentation_chat(path, f"{module_name(path)}.{name}", doc)
    line = " ".join(doc.split("\n\n")[0].split())
    if 20 <= len(line) <= 300 and len(source) <= MAX_ANSWER_CHARS:
        head = source[: source.index("\n")]
        order = pick(ORDERS, f"{path} {name}").format(name=node.name, line=line, head=head)
        yield chat(path, order, f"```python\n{source}```")


def module_documents(path: str, text: str, tree: ast.Module) -> Iterator[Document]:
    split = split_of(path)
    is_test = bool(TEST_PATH.search(path))
    for piece in segments(text, tree):
        # The header tells a piece of a module, which may begin with any statement, from a document of one function.
        yield Document(split, "module", path, f"# {path}\n{piece}")
    for name, node, original in functions(text, tree):
        source = normalized(original)
        if not is_test:
            yield from function_chats(path, name, node, source)
        is_sampled = not is_test or stable_hash(f"{path} {name}") % TEST_FUNCTION_STRIDE == 0
        if is_sampled and MIN_FUNCTION_CHARS <= len(source) <= MAX_FUNCTION_CHARS:
            yield Document(split, "function", path, source)
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and not is_test:
            yield from documentation_chat(path, f"{module_name(path)}.{statement.name}", ast.get_docstring(statement))


def topic_documents() -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        source = f"pydoc topic {name}"
        paragraphs = text.strip().split("\n\n")
        piece = ""
        for paragraph in paragraphs:
            if piece and len(piece) + len(paragraph) > MAX_SEGMENT_CHARS:
                yield Document(split_of(source), "topic", source, piece)
                piece = ""
            piece += paragraph + "\n\n"
        yield Document(split_of(source), "topic", source, piece)
        answer = "\n\n".join(paragraphs[:3])[:MAX_ANSWER_CHARS]
        yield chat(source, pick(TOPIC_QUESTIONS, name).format(name=name.lower()), answer.rsplit("\n", 1)[0])


def c_documents() -> Iterator[Document]:
    for module in C_MODULES:
        prefix = {"builtins": "", "posix": "os."}.get(module, f"{module}.")
        for name, value in sorted(vars(importlib.import_module(module)).items()):
            if name.startswith("_") or not callable(value):
                continue
            source = f"docstring of {prefix}{name}"
            yield from documentation_chat(source, f"{prefix}{name}", inspect.getdoc(value))
            if isinstance(value, type):
                for method in sorted(vars(value)):
                    if not method.startswith("_"):
                        doc = inspect.getdoc(getattr(value, method))
                        yield from documentation_chat(source, f"{prefix}{name}.{method}", doc)


def gather() -> list[Document]:
    """Builds the whole corpus: no text occurs twice, and no text of the training split occurs in another split."""
    documents: list[Document] = []
    for path, text, tree in source_files():
        documents += module_documents(path, text, tree)
    documents += topic_documents()
    documents += c_documents()
    kept: dict[str, Document] = {}
    # Training comes first, so that a text found in several splits stays out of the two it would make easier.
    for document in sorted(documents, key=lambda document: document.split != "train"):
        # A module's header differs where copies of its code do not.
        body = document.text.partition("\n")[2] if document.kind == "module" else document.text
        answer = document.messages[-1]["content"] if document.messages else ""
        kept.setdefault(f"{document.kind}\0{body}\0{answer}", document)
    return list(kept.values())


def heldout_functions(documents: Iterable[Document], count: int = 50, max_per_file: int = 3) -> list[HeldoutFunction]:
    """Chooses top-level functions of held-out files by the hash of file and name alone, at most three of a file.

    The prompt is the `def` line with the docstring or, where there is none, with the first line of the body. Not
    candidates are functions of one statement, of more than 1,500 characters, or found anywhere in the training text.
    """
    modules = [document for document in documents if document.kind == "module"]
    known = "\n".join(document.text for document in modules if document.split == "train")
    candidates: list[HeldoutFunction] = []
    for document in modules:
        if document.split != "heldout" or not parses(document.text):
            continue
        for name, node, source in functions(document.text, ast.parse(document.text)):
            if "." in name or len(node.body) < 2 or len(source) > MAX_FUNCTION_CHARS or source in known:
                continue
            first = node.body[0]
            last_line = (first.end_lineno if ast.get_docstring(node) else None) or first.lineno
            prompt = "".join(source.splitlines(keepends=True)[: last_line - node.lineno + 1])
            if first.lineno > node.lineno and len(prompt) <= 800:
                candidates.append(HeldoutFunction(document.source, name, prompt))
    candidates.sort(key=lambda function: stable_hash(f"{function.source} {function.name}"))
    chosen: list[HeldoutFunction] = []
    for function in candidates:
        if sum(other.source == function.source for other in chosen) < max_per_file:
            chosen.append(function)
    return chosen[:count]


def write(documents: Iterable[Document], path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as lines:
        lines.writelines(json.dumps(asdict(document)) + "\n" for document in documents)


def read(path: Path) -> list[Document]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [Document(**{**(row := json.loads(line)), "messages": tuple(row["messages"])}) for line in lines]


def load(path: Path | None) -> list[Document]:
    """Reads the corpus from a file, or gathers it and writes the file where it does not exist yet."""
    if path is not None and path.exists():
        return read(path)
    documents = gather()
    if path is not None:
        write(documents, path)
    return documents
