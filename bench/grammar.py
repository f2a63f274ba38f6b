"""Grammar libraries side by side: time to compile, time of a mask, JSON schema keywords, and inputs that explode.

Prints Markdown tables; times are the process's CPU time. Run on one core, in an environment of its own, since xgrammar
brings a gigabyte with it:

    python -m venv build/grammar
    build/grammar/bin/python -m pip install -c constraints.txt llguidance xgrammar transformers torch numpy
    taskset -c 1 build/grammar/bin/python bench/grammar.py
"""

import importlib
import json
import multiprocessing
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from grammar_cases import KEYWORDS, NASTY, SCHEMAS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS_BYTES = 60_000_000
NASTY_SECONDS = 10.0


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Library(Protocol):
    """What is asked of each library."""

    def compile(self, kind: str, text: str) -> Any:
        """Raises when the library refuses `text`."""
        ...

    def start(self, compiled: Any) -> tuple[Callable[[], None], Callable[[int], bool]]:
        """Ways to fill a mask, and to accept a token."""
        ...


class LlGuidance:
    """llguidance, with the limits it has by default."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """`tokenizer` is a fast one."""
        self._lib: Any = importlib.import_module("llguidance")
        hf: Any = importlib.import_module("llguidance.hf")
        self._tokenizer = hf.from_tokenizer(tokenizer)
        self._mask = np.zeros((1, (self._tokenizer.vocab_size + 31) // 32), np.int32)

    def compile(self, kind: str, text: str) -> Any:
        """See `Library`."""
        matcher_type = self._lib.LLMatcher
        grammar = {"json_schema": matcher_type.grammar_from_json_schema, "regex": matcher_type.grammar_from_regex}
        matcher = matcher_type(self._tokenizer, grammar[kind](text), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def start(self, compiled: Any) -> tuple[Callable[[], None], Callable[[int], bool]]:
        """See `Library`."""
        matcher = compiled.deep_copy()
        address, size = self._mask.ctypes.data, self._mask.nbytes
        return lambda: matcher.unsafe_compute_mask_ptr(address, size), matcher.consume_token


class XGrammar:
    """xgrammar, with one thread and without its cache."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """`tokenizer` is a fast one."""
        self._lib: Any = importlib.import_module("xgrammar")
        info = self._lib.TokenizerInfo.from_huggingface(tokenizer)
        self._compiler = self._lib.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._mask = self._lib.allocate_token_bitmask(1, info.vocab_size)

    def compile(self, kind: str, text: str) -> Any:
        """See `Library`."""
        if kind == "regex":
            return self._compiler.compile_regex(text)
        return self._compiler.compile_json_schema(text, strict_mode=False)

    def start(self, compiled: Any) -> tuple[Callable[[], None], Callable[[int], bool]]:
        """See `Library`."""
        matcher = self._lib.GrammarMatcher(compiled)
        return lambda: matcher.fill_next_token_bitmask(self._mask), matcher.accept_token


LIBRARIES: dict[str, Callable[[PreTrainedTokenizerFast], Library]] = {"llguidance": LlGuidance, "xgrammar": XGrammar}


def train(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary of Python's own library and of the packages beside it."""
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    texts, size = [], 0
    for path in files:
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size > CORPUS_BYTES:
            break
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<bos>", eos_token="<eos>")


def follow(library: Library, compiled: Any, token_ids: Sequence[int], eos: int) -> tuple[bool, list[float]]:
    """Whether `token_ids` are a whole answer, and the seconds of each mask."""
    fill, accept = library.start(compiled)
    seconds = []
    for token_id in [*token_ids, eos]:
        started = time.process_time()
        fill()
        seconds.append(time.process_time() - started)
        if not accept(token_id):
            return False, seconds
    return True, seconds


def speed(tokenizer: PreTrainedTokenizerFast) -> None:
    """Compile times and mask times over SCHEMAS."""
    for name, make in LIBRARIES.items():
        started = time.process_time()
        library = make(tokenizer)
        start_up = time.process_time() - started
        compiling, masks, refused, wrong = [], [], [], []
        for label, (schema, instance) in SCHEMAS.items():
            tokens = tokenizer(json.dumps(instance, ensure_ascii=False))["input_ids"]
            try:
                started = time.process_time()
                compiled = library.compile("json_schema", json.dumps(schema))
                compiling.append(time.process_time() - started)
            except Exception:
                refused.append(label)
                continue
            fits, seconds = follow(library, compiled, tokens, tokenizer.eos_token_id)
            masks += seconds
            if not fits:
                wrong.append(label)
        _print(
            f"| {name} | {len(tokenizer):,} | {start_up * 1e3:.0f} | {statistics.median(compiling) * 1e3:.1f} "
            f"| {max(compiling) * 1e3:.0f} | {statistics.median(masks) * 1e6:.0f} "
            f"| {np.quantile(masks, 0.99) * 1e6:.0f} | {max(masks) * 1e6:.0f} "
            f"| {', '.join(refused) or '-'} | {', '.join(wrong) or '-'} |"
        )


def keyword(library: Library, tokenizer: PreTrainedTokenizerFast, case: tuple[Any, Any, Any]) -> str:
    """How a library treats a keyword, by a schema, an instance that fits and one that does not."""
    schema, good, bad = case
    try:
        compiled = library.compile("json_schema", json.dumps(schema))
    except Exception:
        return "refused"
    fits = []
    for instance in (good, bad):
        tokens = tokenizer(json.dumps(instance, ensure_ascii=False))["input_ids"]
        fits.append(follow(library, compiled, tokens, tokenizer.eos_token_id)[0])
    if fits[1]:
        return "IGNORED"
    return "enforced" if fits[0] else "too strict"


def explode(name: str, tokenizer: PreTrainedTokenizerFast, kind: str, text: str, results: Any) -> None:
    """Compile one input and take three masks, in a process of its own."""
    library = LIBRARIES[name](tokenizer)
    results.put("")
    started = time.process_time()
    try:
        fill, accept = library.start(library.compile(kind, text))
        for token_id in tokenizer('{"aaaa')["input_ids"][:3] if kind == "json_schema" else tokenizer("x")["input_ids"]:
            fill()
            accept(token_id)
        fill()
        outcome = "compiled"
    except Exception as error:
        outcome = "refused: " + (str(error).splitlines() or [""])[0][:60].replace("|", "\\|")
    results.put(f"{outcome}, {time.process_time() - started:.2f} s")


def nasty(name: str, tokenizer: PreTrainedTokenizerFast, kind: str, text: str) -> str:
    """What came of an input that explodes, and how long it took."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=explode, args=(name, tokenizer, kind, text, results))
    process.start()
    results.get()
    process.join(NASTY_SECONDS)
    if process.is_alive():
        process.kill()
        return f"not done after {NASTY_SECONDS:.0f} s"
    return str(results.get()) if process.exitcode == 0 else f"killed the process ({process.exitcode})"


def main() -> None:
    """Print all tables."""
    small, large = train(32_000), train(150_000)
    _print(
        "| library | vocabulary | start ms | compile p50 ms | max | mask p50 us | p99 | max | refused | too strict |"
    )
    _print("|---|---|---|---|---|---|---|---|---|---|")
    for tokenizer in (small, large):
        speed(tokenizer)
    _print(f"\n| keyword | {' | '.join(LIBRARIES)} |\n|---|---|---|")
    libraries = [make(small) for make in LIBRARIES.values()]
    for label, case in KEYWORDS.items():
        _print(f"| {label} | {' | '.join(keyword(library, small, case) for library in libraries)} |")
    _print(f"\n| input | {' | '.join(LIBRARIES)} |\n|---|---|---|")
    for label, (kind, text) in NASTY.items():
        _print(f"| {label} | {' | '.join(nasty(name, small, kind, text) for name in LIBRARIES)} |")


if __name__ == "__main__":
    main()
