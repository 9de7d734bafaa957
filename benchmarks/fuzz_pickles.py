"""Pickles of refs for the fuzzer: valid ones in every protocol, and the ways they are mutated."""

import functools
import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz_sets import BASES, MARKER, NUMBERS, TEXTS, changed_bytes, copy, cut, sets, spliced, structure

LENGTHS = (0, 1, 2, 255, 256, 65535, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
LINES = (b"", b"0", b"1", b"-1", b"00", b"01", b"4294967295", b"9" * 400, b"9" * 5000, b"1L", b"0x1", b"nan", b"1e999",
         b"'a'", b"'a", b"\\ud800", b"\xe9", b"os", b"builtins", b"system", b"eval", b"a" * 3000)  # fmt: skip
PLAIN = [
    one for one in pickletools.opcodes if one.code in "N\x88\x89(]aeld}su\x94\x80KhqMJjG\x95rILSVFgpU\x8a\x8cTX\x8b\x8d"
]
PROGRAMS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("os", "system", (f"touch {MARKER}",)), ("posix", "system", (f"touch {MARKER}",)), ("os", "mkdir", (MARKER,)),
    ("os", "mkfifo", (MARKER,)), ("posix", "mkfifo", (MARKER,)), ("os", "_exit", (0,)), ("sys", "exit", (0,)),
    ("builtins", "exec", (f"open('{MARKER}', 'w')",)), ("builtins", "eval", (f"open('{MARKER}', 'w')",)),
    ("__builtin__", "eval", (f"open('{MARKER}', 'w')",)), ("__builtin__", "file", (MARKER, "w")),
    ("builtins", "open", (MARKER, "w")), ("io", "open", (MARKER, "w")), ("codecs", "open", (MARKER, "w")),
    ("builtins", "getattr", ("", "join")), ("builtins", "__import__", ("this",)),
    ("builtins", "compile", ("1", "", "eval")),
    ("importlib", "import_module", ("this",)), ("operator", "attrgetter", ("mro",)),
    ("operator", "methodcaller", ("f",)),
    ("subprocess", "Popen", (["touch", MARKER],)), ("subprocess", "check_output", (["touch", MARKER],)),
    ("runpy", "run_path", (MARKER,)), ("shutil", "rmtree", (MARKER,)),
    ("socket", "create_connection", (("127.0.0.1", 9),)),
    ("pickle", "loads", (b"N.",)), ("_pickle", "loads", (b"N.",)), ("marshal", "loads", (b"N",)),
    ("ctypes", "CDLL", ("libc.so.6",)), ("time", "sleep", (10**6,)), ("codecs", "decode", ("n", "rot13")),
    ("collections", "OrderedDict", ()), ("copyreg", "_reconstructor", ()), ("numpy", "load", (MARKER,)),
    ("torch", "load", (MARKER,)), ("a\nb", "c", ()), ("a" * 5000, "b" * 5000, ()), ("é", "\ud800", ()), ("", "", ()),
)  # fmt: skip


@functools.cache
def pickles(base: str) -> list[bytes]:
    """A set's refs in every protocol; the first ones also as Python 2 wrote them, with byte strings."""
    plain = [pickle.dumps(sets()[base][0], protocol) for protocol in range(6)]
    return plain + [_with_byte_strings(data) for data in plain[:3]]


def _with_byte_strings(data: bytes) -> bytes:
    """Text becomes Python 2's str: T instead of X, which count alike; S'…' instead of V…, where it is the same."""
    parts = []
    for code, _, start, end in _opcodes_of(data):
        part = data[start:end]
        if code == "X":
            part = b"T" + part[1:]
        elif code == "V" and not set(b"\\'") & set(part) and part.isascii():
            part = b"S'" + part[1:-1] + b"'\n"
        parts.append(part)
    return b"".join(parts)


@functools.lru_cache(maxsize=64)
def _opcodes_of(data: bytes) -> list[tuple[str, Any, int, int]]:
    """Code, argument, start and end of each opcode."""
    found = [(opcode.code, argument, at) for opcode, argument, at in pickletools.genops(data)]
    ends = [*(at for _, _, at in found[1:]), len(data)]
    return [(*one, end) for one, end in zip(found, ends, strict=True)]


def is_plain(data: bytes) -> bool:
    """Whether a pickle has only opcodes of lists, dicts, text and numbers until its end, read one after the other."""
    return all(one in PLAIN or one.name in ("FRAME", "STOP") for one, _, _ in pickletools.genops(data))


def _fragment(value: Any) -> bytes:
    """The opcodes that make a value, without memo, start and end."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    pickler.fast = True
    pickler.dump(value)
    return buffer.getvalue()[2:-1]


def _inserted(draw: st.DrawFn, data: bytes, part: bytes) -> bytes:
    """A part before one of the opcodes, instead of it, or alone."""
    way = draw(st.sampled_from(("before", "before", "instead", "alone", "last")))
    if way == "alone":
        return draw(st.sampled_from((b"", b"\x80\x02", b"\x80\x04", b"]"))) + part + b"."
    if way == "last":
        return data[:-1] + part + b"."
    _, _, start, end = draw(st.sampled_from(_opcodes_of(data)))
    popped = draw(st.sampled_from((b"", b"", b"0")))
    return data[:start] + part + popped + data[end if way == "instead" else start :]


@st.composite
def opcode(draw: st.DrawFn, among: list[Any] = pickletools.opcodes) -> bytes:
    """One of these opcodes, its argument right or absurd."""
    chosen = draw(st.sampled_from(among))
    code = chosen.code.encode("latin-1")
    if chosen.arg is None:
        return code
    size = chosen.arg.n
    if size == pickletools.UP_TO_NEWLINE:
        lines = 2 if chosen.name in ("GLOBAL", "INST") else 1
        return code + b"".join(draw(st.sampled_from(LINES)) + b"\n" for _ in range(lines))
    if size >= 0:
        absurd = st.sampled_from([(length % 256**size).to_bytes(size, "little") for length in LENGTHS])
        return code + draw(absurd | st.binary(min_size=size, max_size=size))
    width = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }[size]  # fmt: skip
    content = draw(st.binary(max_size=30))
    told = draw(st.sampled_from((len(content), len(content), *LENGTHS))) % 256**width
    return code + told.to_bytes(width, "little") + content


@st.composite
def program(draw: st.DrawFn) -> bytes:
    """Opcodes that make an unpickler which allows it call something, in one of the ways there are."""
    module, name, arguments = draw(st.sampled_from(PROGRAMS))
    module_bytes, name_bytes = (text.encode("utf-8", "surrogatepass") for text in (module, name))
    named = b"c" + module_bytes + b"\n" + name_bytes + b"\n"
    stacked = b"".join(b"X" + len(one).to_bytes(4, "little") + one for one in (module_bytes, name_bytes)) + b"\x93"
    packed, single = _fragment(arguments), b"".join(map(_fragment, arguments))
    found = draw(st.sampled_from((named, stacked)))
    return draw(st.sampled_from((
        found + packed + b"R",  # REDUCE
        b"(" + single + b"i" + named[1:],  # INST
        b"(" + found + single + b"o",  # OBJ
        found + packed + b"\x81",  # NEWOBJ
        found + packed + b"}\x92",  # NEWOBJ_EX
        found + b")R" + packed + b"b",  # BUILD
        b"\x82\x01" + packed + b"R", b"\x83\x01\x01" + packed + b"R", b"\x84\x01\1\1\0" + packed + b"R",  # EXT
        b"P" + module_bytes + b"\n", single + b"Q",  # PERSID, BINPERSID
        found,
    )))  # fmt: skip


def _nested_pickle(draw: st.DrawFn) -> bytes:
    depth = draw(st.sampled_from((2, 50, 900, 1100, 5000, 100_000)))
    inner = draw(st.sampled_from((
        b"]" * depth + b"a" * (depth - 1), b"(" * depth + b"l" * depth, b"(" * depth + b"t" * depth,
        b")" + b"\x85" * depth,
        b"K\x01" + b"\x85" * depth, b"}K\x01" * depth + b"}" + b"s" * depth, b"(K\x01" * depth + b"N" + b"d" * depth,
        b"\x8f(" * depth + b"\x90" * depth, b"(" * depth + b"\x91" * depth, b"(" * depth, b"N" + b"2" * depth,
        b"]" + b"2a" * depth,
    )))  # fmt: skip
    return draw(st.sampled_from((inner, b"}" + inner + b"Ns", b"}K\x01" + inner + b"s", b"](" + inner + b"e")))


@functools.lru_cache(maxsize=8)
def colliding(count: int, form: str) -> bytes:
    """A dict whose keys all have the hash 0: each of them is compared with all before."""
    numbers = [key * (2**61 - 1) for key in range(1, count + 1)]
    if form == "text":
        return b"(" + b"".join(b"L%dL\nN" % number for number in numbers) + b"d"
    if form == "short":  # as far as eight bytes go, and different in their lowest bits only late
        return b"}(" + b"".join(b"\x8a\x08" + (key << 40).to_bytes(8, "little") + b"N" for key in range(count)) + b"u"
    return b"}(" + b"".join(_fragment(number) + b"N" for number in numbers) + b"u"


def _long_pickle(draw: st.DrawFn) -> bytes:
    count = draw(st.sampled_from((300, 70_000, 1_000_000)))
    return draw(st.sampled_from((
        b"X" + count.to_bytes(4, "little") + b"a" * count, b"T" + count.to_bytes(4, "little") + b"\n" * count,
        b"V" + b"a" * count + b"\n", b"I" + b"1" * count + b"\n", b"L" + b"1" * count + b"L\n",
        b"F" + b"1" * count + b"\n",
        b"\x8b" + count.to_bytes(4, "little") + b"\x7f" * count, b"](" + b"N" * count + b"e",
        b"](" + b"]" * count + b"e",
        b"S'" + b"\\x41" * count + b"'\n", b"V" + b"\\u00e9" * count + b"\n", b"c" + b"a" * count + b"\n" + b"b\n",
        b"P" + b"a" * count + b"\n", b"g" + b"1" * count + b"\n", b"S" + b"a" * count + b"\n", b"N" * count,
        b"K\x01" * count,
    )))  # fmt: skip


def _cyclic_pickle(draw: st.DrawFn, refs: list[Any]) -> bytes:
    """Records that hold themselves or the list they are in."""
    refs = copy(refs)
    records = [refs, *refs, *(sentence for ref in refs for sentence in ref["sentences"])]
    for _ in range(draw(st.integers(1, 3))):
        holder, held = draw(st.sampled_from(records)), draw(st.sampled_from(records))
        if isinstance(holder, list):
            holder[draw(st.integers(0, len(holder) - 1))] = held
        else:
            holder[draw(st.sampled_from(sorted(holder)))] = held
    return pickle.dumps(refs, draw(st.integers(0, 5)))


def _kind(mutate: Callable[[st.DrawFn, bytes, str], bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    @st.composite
    def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
        base = draw(BASES)
        return base, mutate(draw, draw(st.sampled_from(pickles(base))), base)

    return mutated()


def _structured(draw: st.DrawFn, data: bytes, base: str) -> bytes:
    return pickle.dumps(structure(draw, sets()[base][0]), draw(st.integers(0, 5)))


def behind_a_frame(hidden: bytes) -> bytes:
    """Opcodes that look like text in the order of the file, but which CPython's unpickler runs if it heeds frames.

    Where a frame ends within an argument, it drops the rest of the frame and takes the argument from behind: the number
    J aNNN becomes J NNNU, the text U of 78 (an N) bytes runs, and in it another text swallows the head of the last one.
    """
    last = b"0X\x05\0\0\0"
    head = b"JaNNNUN" + b"N" * (ord("N") - len(last)) + last
    return b"\x95" + (2).to_bytes(8, "little") + head + b"X" + len(hidden).to_bytes(4, "little") + hidden


def _framed(draw: st.DrawFn, data: bytes, base: str) -> bytes:
    """With frames that end where they should not: the unpickler of C goes on elsewhere than it stopped."""
    if not draw(st.integers(0, 3)):
        nested = b"}K\x01" + b"\x85" * 200_000 + b"K\x01s"
        hidden = draw(st.sampled_from((nested, b"r\xff\xff\xff\x7f", b"20")) | program() | opcode())
        return _inserted(draw, data, behind_a_frame(hidden))
    if not draw(st.integers(0, 3)):  # a text that takes the opcode behind it instead of its own first byte
        frame = b"\x95" + (6).to_bytes(8, "little")
        return _inserted(draw, data, frame + b"X\x04\0\0\0this" + draw(st.sampled_from((b"Q", b"\x93", b"R"))) + b"0")
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(0, 60) | st.sampled_from(LENGTHS)) % 2**64
        _, _, start, _ = draw(st.sampled_from(_opcodes_of(data)))
        data = data[:start] + b"\x95" + length.to_bytes(8, "little") + data[start:]
    return _inserted(draw, data, draw(program() | opcode())) if draw(st.booleans()) else data


def _opcode_soup(draw: st.DrawFn, data: bytes, base: str) -> bytes:
    among = draw(st.sampled_from((PLAIN, PLAIN, pickletools.opcodes)))
    return _opcodes(draw, opcode(among), 30) + draw(st.sampled_from((b".", b"")))


def _opcodes(draw: st.DrawFn, kinds: st.SearchStrategy[bytes], most: int) -> bytes:
    return b"".join(draw(st.lists(kinds, min_size=1, max_size=most)))


def _told_texts(draw: st.DrawFn, data: bytes, base: str) -> bytes:
    """Other splits, sentences and ids: what messages may quote, and files be named after."""
    refs = copy(sets()[base][0])
    for _ in range(draw(st.integers(1, 3))):
        ref = draw(st.sampled_from(refs))
        record = draw(st.sampled_from([ref, ref, *ref["sentences"]]))
        if record is ref and draw(st.booleans()):
            ref["split"] = draw(TEXTS)
        else:
            record[draw(st.sampled_from(sorted(record)))] = draw(TEXTS | NUMBERS)
    return pickle.dumps(refs, draw(st.integers(0, 5)))


def _collision(draw: st.DrawFn, data: bytes, base: str) -> bytes:
    keys = colliding(draw(st.sampled_from((10, 1000, 60_000))), draw(st.sampled_from(("binary", "text", "short"))))
    return _inserted(draw, data, keys)


def pickle_kinds() -> dict[str, st.SearchStrategy[tuple[str, bytes]]]:
    """The ways refs are mutated, by name."""
    ways: dict[str, Callable[[st.DrawFn, bytes, str], bytes]] = {
        "bytes changed": lambda draw, data, base: changed_bytes(draw, data),
        "cut": lambda draw, data, base: cut(draw, data),
        "spliced, repeated": lambda draw, data, base: spliced(draw, data, draw(st.sampled_from(pickles(base)))),
        "opcodes put in": lambda draw, data, base: _inserted(draw, data, _opcodes(draw, opcode(), 4)),
        "opcodes of plain data put in": lambda draw, data, base: _inserted(
            draw, data, _opcodes(draw, opcode(PLAIN), 4)
        ),
        "opcodes at random": _opcode_soup,
        "frames": _framed,
        "foreign code": lambda draw, data, base: _inserted(draw, data, draw(program())),
        "deep nesting": lambda draw, data, base: _inserted(draw, data, _nested_pickle(draw)),
        "keys of one hash": _collision,
        "very long": lambda draw, data, base: _inserted(draw, data, _long_pickle(draw)),
        "wrong values": _structured,
        "splits, sentences, ids": _told_texts,
        "records in themselves": lambda draw, data, base: _cyclic_pickle(draw, sets()[base][0]),
        "wrong values, bytes changed": lambda draw, data, base: changed_bytes(draw, _structured(draw, data, base), 2),
    }
    return {name: _kind(mutate) for name, mutate in ways.items()}
