"""Mutations of refs(unc).p, a pickle."""

import functools
import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz_annotations.mutations import change_bytes, change_values, splice, truncate, valid_refs

MARKER = "marker"  # file that the programs in pickles create when they are executed
LENGTHS = (0, 1, 2, 255, 256, 65535, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
# Without 0x1, which pickle reads as a number but pickletools cannot parse.
LINES = (b"", b"0", b"1", b"-1", b"00", b"01", b"4294967295", b"9" * 400, b"9" * 5000, b"1L", b"nan", b"1e999",
         b"'a'", b"'a", b"\\ud800", b"\xe9", b"os", b"builtins", b"system", b"eval", b"a" * 3000)  # fmt: skip
PLAIN_CODES = "N\x88\x89(]aeld}su\x94\x80KhqMJjG\x95rILSVFgpU\x8a\x8cTX\x8b\x8d"
PLAIN = [opcode for opcode in pickletools.opcodes if opcode.code in PLAIN_CODES]
CALLS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("os", "system", (f"touch {MARKER}",)), ("posix", "system", (f"touch {MARKER}",)), ("os", "mkfifo", (MARKER,)),
    ("os", "_exit", (0,)), ("sys", "exit", (0,)), ("time", "sleep", (10**6,)), ("builtins", "open", (MARKER, "w")),
    ("builtins", "exec", (f"open('{MARKER}', 'w')",)), ("__builtin__", "eval", (f"open('{MARKER}', 'w')",)),
    ("builtins", "getattr", ("", "join")), ("builtins", "__import__", ("this",)), ("builtins", "bytearray", (2**40,)),
    ("importlib", "import_module", ("this",)), ("subprocess", "Popen", (["touch", MARKER],)),
    ("socket", "create_connection", (("127.0.0.1", 9),)), ("pickle", "loads", (b"N.",)), ("ctypes", "CDLL", ("libc",)),
    ("collections", "OrderedDict", ()), ("copyreg", "_reconstructor", ()), ("codecs", "decode", ("n", "rot13")),
    ("a\nb", "c", ()), ("a" * 5000, "b" * 5000, ()), ("é", "\ud800", ()), ("", "", ()),
)  # fmt: skip


@functools.cache
def valid_pickles() -> list[bytes]:
    """Return the refs in all protocols of Python 3, and in those of Python 2 with byte strings."""
    pickles = [pickle.dumps(valid_refs(), protocol) for protocol in range(6)]
    return pickles + [_with_byte_strings(data) for data in pickles[:3]]


def _with_byte_strings(data: bytes) -> bytes:
    """Replace text by Python 2's byte strings: opcode X by T, which has the same form, and V by S with quotes."""
    parts = []
    for code, start, end in _opcodes(data):
        part = data[start:end]
        if code == "X":
            part = b"T" + part[1:]
        elif code == "V" and not set(b"\\'") & set(part) and part.isascii():
            part = b"S'" + part[1:-1] + b"'\n"
        parts.append(part)
    return b"".join(parts)


@functools.lru_cache(maxsize=64)
def _opcodes(data: bytes) -> list[tuple[str, int, int]]:
    """Return code, start and end of each opcode."""
    starts = [(opcode.code, start) for opcode, _, start in pickletools.genops(data)]
    ends = [*(start for _, start in starts[1:]), len(data)]
    return [(code, start, end) for (code, start), end in zip(starts, ends, strict=True)]


def is_plain(data: bytes) -> bool:
    """Return whether all opcodes of a pickle build lists, dicts, text and numbers."""
    return all(op in PLAIN or op.name in ("FRAME", "STOP") for op, _, _ in pickletools.genops(data))


def dump_opcodes(value: Any) -> bytes:
    """Return the opcodes that build a value, without memo, start and end."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    pickler.fast = True
    pickler.dump(value)
    return buffer.getvalue()[2:-1]


def insert(draw: st.DrawFn, opcodes: bytes) -> bytes:
    """Insert opcodes into a valid pickle before an opcode, in place of one, or at its end; or return them alone."""
    data = draw(st.sampled_from(valid_pickles()))
    place = draw(st.sampled_from(("before", "before", "instead", "end", "alone")))
    if place == "alone":
        return draw(st.sampled_from((b"", b"\x80\x02", b"\x80\x04", b"]"))) + opcodes + b"."
    if place == "end":
        return data[:-1] + opcodes + b"."
    _, start, end = draw(st.sampled_from(_opcodes(data)))
    pop = draw(st.sampled_from((b"", b"", b"0")))
    return data[:start] + opcodes + pop + data[end if place == "instead" else start :]


@st.composite
def opcode(draw: st.DrawFn, among: list[Any] = pickletools.opcodes) -> bytes:
    """Generate an opcode with a valid or an absurd argument."""
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
    length_bytes = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }[size]  # fmt: skip
    content = draw(st.binary(max_size=30))
    length = draw(st.sampled_from((len(content), len(content), *LENGTHS))) % 256**length_bytes
    return code + length.to_bytes(length_bytes, "little") + content


@st.composite
def call(draw: st.DrawFn) -> bytes:
    """Generate opcodes that call a Python function, by any of pickle's mechanisms."""
    module, name, arguments = draw(st.sampled_from(CALLS))
    module_bytes, name_bytes = (text.encode("utf-8", "surrogatepass") for text in (module, name))
    names = module_bytes + b"\n" + name_bytes + b"\n"
    stack_global = b"".join(b"X" + len(t).to_bytes(4, "little") + t for t in (module_bytes, name_bytes)) + b"\x93"
    function = draw(st.sampled_from((b"c" + names, stack_global)))
    as_tuple, on_stack = dump_opcodes(arguments), b"".join(map(dump_opcodes, arguments))
    return draw(st.sampled_from((
        function,
        function + as_tuple + b"R",  # REDUCE
        b"(" + on_stack + b"i" + names,  # INST
        b"(" + function + on_stack + b"o",  # OBJ
        function + as_tuple + b"\x81",  # NEWOBJ
        function + as_tuple + b"}\x92",  # NEWOBJ_EX
        function + b")R" + as_tuple + b"b",  # BUILD
        b"\x82\x01" + as_tuple + b"R", b"\x83\x01\x01" + as_tuple + b"R", b"\x84\x01\1\1\0" + as_tuple + b"R",  # EXT
        b"P" + module_bytes + b"\n", on_stack + b"Q",  # PERSID, BINPERSID
    )))  # fmt: skip


def _change_opcodes(draw: st.DrawFn) -> bytes:
    among = draw(st.sampled_from((PLAIN, pickletools.opcodes)))
    return insert(draw, b"".join(draw(st.lists(opcode(among), min_size=1, max_size=draw(st.sampled_from((4, 30)))))))


def hide_behind_frame(opcodes: bytes) -> bytes:
    """Return opcodes that CPython executes although a parser of the file sees them as text.

    If a frame ends within an argument, CPython's unpickler drops the rest of the frame and takes the argument from
    behind it. Here the number ``J aNNN`` becomes ``J NNNU``, so the content of the text ``U`` (length 78, an N) is
    executed, and in it another text swallows the header of the last one.
    """
    last = b"0X\x05\0\0\0"
    header = b"JaNNNUN" + b"N" * (ord("N") - len(last)) + last
    return b"\x95" + (2).to_bytes(8, "little") + header + b"X" + len(opcodes).to_bytes(4, "little") + opcodes


def _add_frames(draw: st.DrawFn) -> bytes:
    """Add frames that end at the wrong place."""
    kind = draw(st.sampled_from(("hidden opcodes", "swallowed opcode", "any", "any")))
    if kind == "hidden opcodes":
        nested_tuples = b"}K\x01" + b"\x85" * 200_000 + b"K\x01s"
        return insert(
            draw,
            hide_behind_frame(draw(st.sampled_from((nested_tuples, b"r\xff\xff\xff\x7f", b"20")) | call() | opcode())),
        )
    if kind == "swallowed opcode":  # the text includes the opcode behind it, and lacks its own first byte
        frame = b"\x95" + (6).to_bytes(8, "little")
        return insert(draw, frame + b"X\x04\0\0\0this" + draw(st.sampled_from((b"Q", b"\x93", b"R"))) + b"0")
    data = draw(st.sampled_from(valid_pickles()))
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(0, 60) | st.sampled_from(LENGTHS)) % 2**64
        _, start, _ = draw(st.sampled_from(_opcodes(data)))
        data = data[:start] + b"\x95" + length.to_bytes(8, "little") + data[start:]
    return data


def _nest(draw: st.DrawFn) -> bytes:
    depth = draw(st.sampled_from((2, 50, 900, 1100, 5000, 100_000)))
    nested = draw(st.sampled_from((
        b"]" * depth + b"a" * (depth - 1), b"(" * depth + b"l" * depth, b"(" * depth + b"t" * depth,
        b")" + b"\x85" * depth, b"K\x01" + b"\x85" * depth, b"}K\x01" * depth + b"}" + b"s" * depth,
        b"(K\x01" * depth + b"N" + b"d" * depth, b"\x8f(" * depth + b"\x90" * depth,
        b"(" * depth + b"\x91" * depth, b"(" * depth, b"N" + b"2" * depth, b"]" + b"2a" * depth,
    )))  # fmt: skip
    inside = (nested, b"}" + nested + b"Ns", b"}K\x01" + nested + b"s", b"](" + nested + b"e")
    return insert(draw, draw(st.sampled_from(inside)))


@functools.lru_cache(maxsize=9)
def colliding_keys(count: int, form: str) -> bytes:
    """Return the opcodes of a dict whose keys have the same hash, so that each is compared with all others.

    Args:
        form: ``binary`` or ``text`` for integers of any length, ``short`` for integers of eight bytes.
    """
    numbers = [key * (2**61 - 1) for key in range(1, count + 1)]
    if form == "text":
        return b"(" + b"".join(b"L%dL\nN" % number for number in numbers) + b"d"
    if form == "short":  # the lowest 40 bits are equal, which determine the position in a dict's table
        return b"}(" + b"".join(b"\x8a\x08" + (key << 40).to_bytes(8, "little") + b"N" for key in range(count)) + b"u"
    return b"}(" + b"".join(dump_opcodes(number) + b"N" for number in numbers) + b"u"


def _collide(draw: st.DrawFn) -> bytes:
    count, form = draw(st.sampled_from((10, 1000, 60_000))), draw(st.sampled_from(("binary", "text", "short")))
    return insert(draw, colliding_keys(count, form))


def _lengthen(draw: st.DrawFn) -> bytes:
    count = draw(st.sampled_from((300, 70_000, 1_000_000)))
    length = count.to_bytes(4, "little")
    return insert(draw, draw(st.sampled_from((
        b"X" + length + b"a" * count, b"T" + length + b"\n" * count, b"\x8b" + length + b"\x7f" * count,
        b"V" + b"a" * count + b"\n", b"I" + b"1" * count + b"\n", b"L" + b"1" * count + b"L\n",
        b"F" + b"1" * count + b"\n", b"S'" + b"\\x41" * count + b"'\n", b"V" + b"\\u00e9" * count + b"\n",
        b"S" + b"a" * count + b"\n", b"c" + b"a" * count + b"\n" + b"b\n", b"P" + b"a" * count + b"\n",
        b"g" + b"1" * count + b"\n", b"](" + b"N" * count + b"e", b"](" + b"]" * count + b"e", b"N" * count,
    ))))  # fmt: skip


def _change_values(draw: st.DrawFn) -> bytes:
    data = pickle.dumps(change_values(draw, valid_refs()), draw(st.integers(0, 5)))
    return change_bytes(draw, data) if draw(st.booleans()) else data


def _make_cycles(draw: st.DrawFn) -> bytes:
    """Put records into themselves or into each other."""
    refs: Any = valid_refs()
    records = [refs, *refs, *(sentence for ref in refs for sentence in ref["sentences"])]
    for _ in range(draw(st.integers(1, 3))):
        holder, content = draw(st.sampled_from(records)), draw(st.sampled_from(records))
        holder[draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))] = content
    return pickle.dumps(refs, draw(st.integers(0, 5)))


def _any_pickle(draw: st.DrawFn) -> bytes:
    return draw(st.sampled_from(valid_pickles()))


PICKLE_MUTATIONS: dict[str, Callable[[st.DrawFn], bytes]] = {
    "bytes": lambda draw: change_bytes(draw, _any_pickle(draw)),
    "truncated": lambda draw: truncate(draw, _any_pickle(draw)),
    "spliced, repeated": lambda draw: splice(draw, _any_pickle(draw), _any_pickle(draw)),
    "values": _change_values,
    "cycles": _make_cycles,
    "opcodes": _change_opcodes,
    "frames": _add_frames,
    "calls of functions": lambda draw: insert(draw, draw(call())),
    "deep nesting": _nest,
    "keys with one hash": _collide,
    "very long": _lengthen,
}
