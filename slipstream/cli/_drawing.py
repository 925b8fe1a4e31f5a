"""A graph as an SVG: one box an op, its weights and step inputs written inside; what repeats is drawn once."""

from html import escape
from itertools import pairwise
from pathlib import Path

from slipstream.cli._folding import Stretch, fold, unnumbered
from slipstream.cli._layout import Box, Edge, place
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import UsageError

_COLOURS = (  # what an op's name contains → fill and border
    ("attention", "#ffe8cc", "#e8590c"),
    ("norm", "#d3f9d8", "#2f9e44"),
    ("rope", "#e5dbff", "#7048e8"),
    ("kv_write", "#e5dbff", "#7048e8"),
    ("linear", "#d0ebff", "#1971c2"),
    ("moe", "#d0ebff", "#1971c2"),
    ("embedding", "#fff3bf", "#e67700"),
)
_GREY = "#868e96"
_PLAIN = ("#f1f3f5", _GREY)
_MOST_BOXES = 1000
_LONGEST = 46  # characters of a line in a box
_MARGIN, _LINE, _PAD, _FRAME = 28.0, 15.0, 9.0, 16.0
_FONT = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\""


def draw(graph: Graph, title: str) -> str:
    """The SVG's text."""
    stretches = fold(graph)
    shown = _Shown(graph, stretches)
    if len(shown.boxes) > _MOST_BOXES:
        raise UsageError(f"The graph has {len(shown.boxes)} ops that do not repeat; {_MOST_BOXES} can be drawn.")
    pairs = _pairs(graph, shown)
    edges = place(shown.boxes, [(source, target) for source, target, _ in pairs])
    frames = [_Frame(shown, stretch, edges) for stretch in stretches if stretch.times > 1]
    points = [(point.x - point.width / 2, point.x + point.width / 2) for edge in edges for point in edge.points]
    sides = [*((box.x - box.width / 2, box.x + box.width / 2) for box in shown.boxes), *points]
    sides += [(frame.left, frame.right + 40) for frame in frames]
    left = min((side[0] for side in sides), default=0) - _MARGIN
    top = -_MARGIN - 44
    width = max(max((side[1] for side in sides), default=0) + _MARGIN - left, 9.0 * len(title) + 160)
    height = max((box.band[1] for box in shown.boxes), default=0) + _MARGIN - top
    subtitle = f"{len(graph.nodes)} ops" + (f", {len(shown.boxes)} drawn" if frames else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}" {_FONT}>',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0.5 L8,4 L0,7.5 z" fill="{_GREY}"/></marker></defs>',
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>',
        f'<text x="{left + _MARGIN:.1f}" y="{top + 30:.1f}" font-size="17" font-weight="600" fill="#212529">'
        f'{escape(title)}<tspan dx="10" font-size="13" font-weight="400" fill="{_GREY}">{subtitle}</tspan></text>',
        *(frame.svg() for frame in frames),
        *(_edge(edge, through_cache) for edge, (_, _, through_cache) in zip(edges, pairs, strict=True)),
        *(_node(node, box, lines) for node, box, lines in zip(shown.nodes, shown.boxes, shown.lines, strict=True)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Shown:
    """What is drawn: of each stretch the first run, whose boxes stand for the later ones, too."""

    def __init__(self, graph: Graph, stretches: list[Stretch]) -> None:
        self.nodes: list[Node] = []
        self.lines: list[list[str]] = []
        self.boxes: list[Box] = []
        self._box_at: list[Box] = []  # by the place of a node in the graph
        for stretch in stretches:
            first_box = len(self.boxes)
            for offset in range(stretch.length):
                alike = graph.nodes[stretch.start + offset : stretch.end : stretch.length]
                self.nodes.append(alike[0])
                self.lines.append(_lines(alike, graph))
                self.boxes.append(_box(self.lines[-1]))
            self._box_at += self.boxes[first_box:] * stretch.times

    def at(self, position: int) -> Box:
        return self._box_at[position]


def _pairs(graph: Graph, shown: _Shown) -> list[tuple[Box, Box, bool]]:
    """(who makes, who reads, whether only through the KV cache); what enters a stretch is shown for its first run."""
    from slipstream.kernels.registry import known_ops

    ops = known_ops()
    makers = {name: shown.at(position) for position, node in enumerate(graph.nodes) for name in node.outputs}
    writers: dict[str, Box] = {}
    pairs: dict[tuple[int, int], tuple[Box, Box, bool]] = {}
    drawn = {id(node) for node in shown.nodes}
    for position, node in enumerate(graph.nodes):
        target = shown.at(position)
        for name in filter(None, node.inputs if id(node) in drawn else ()):
            for source, is_cache in ((makers.get(name), False), (writers.get(name), True)):
                if source is not None:
                    pairs.setdefault((id(source), id(target)), (source, target, is_cache))
        arguments = ops[node.op].tensor_arguments if node.op in ops else ()
        for argument, written in zip(arguments, node.inputs, strict=False):
            if argument.is_mutated and written is not None:
                writers[written] = target
    return list(pairs.values())


def _lines(alike: list[Node], graph: Graph) -> list[str]:
    """The op; what it makes; its weights with their shapes; the step's inputs it reads. `alike`: one node a run."""

    def names(place: int) -> str:
        found = [node.inputs[place] or "" for node in alike]
        return ", ".join(dict.fromkeys(map(unnumbered, found) if len(alike) > 1 else found))

    node = alike[0]
    made = "  ".join(_shape(graph.types[name]) for name in node.outputs)
    weights = [
        f"{_short(names(i))}  {_shape(graph.weights[n])}" for i, n in enumerate(node.inputs) if n in graph.weights
    ]
    read = ", ".join(names(i).removeprefix("step.") for i, name in enumerate(node.inputs) if name in graph.inputs)
    return [node.op, *filter(None, [made, *weights, _short(read)])]


def _shape(kind: TensorType) -> str:
    return "[" + ", ".join(map(str, kind.shape)) + "]"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST // 2] + "…" + name[1 - _LONGEST // 2 :]


def _box(lines: list[str]) -> Box:
    width = max(8.2 * len(lines[0]), *(6.3 * len(line) for line in lines)) + 2 * _PAD
    return Box(max(width, 84.0), _LINE * len(lines) + 2 * _PAD - 2)


def _node(node: Node, box: Box, lines: list[str]) -> str:
    fill, border = next((colours for word, *colours in _COLOURS if word in node.op), _PLAIN)
    left, top = box.x - box.width / 2, box.y - box.height / 2
    texts = []
    for number, line in enumerate(lines):
        style = 'font-size="13" font-weight="600" fill="#212529"' if number == 0 else 'font-size="11" fill="#495057"'
        y = top + _PAD + 11 + number * _LINE
        texts.append(f'<text x="{box.x:.1f}" y="{y:.1f}" text-anchor="middle" {style}>{escape(line)}</text>')
    shape = f'x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="7"'
    return (
        f'<g><title>{escape(str(node))}</title><rect {shape} fill="{fill}" stroke="{border}" stroke-width="1.2"/>'
        f"{''.join(texts)}</g>"
    )


def _edge(edge: Edge, through_cache: bool) -> str:
    """Straight down through the rows, curved in the gaps between them."""
    first, last = edge.points[0], edge.points[-1]
    begin, finish = first.y + first.height / 2, last.y - last.height / 2
    path = f"M{first.x:.1f},{begin:.1f}"
    for upper, lower in pairwise(edge.points):
        start, end = upper.band[1], lower.band[0] if lower is not last else finish
        middle = (start + end) / 2
        path += f" L{upper.x:.1f},{start:.1f}" if start > begin else ""
        path += f" C{upper.x:.1f},{middle:.1f} {lower.x:.1f},{middle:.1f} {lower.x:.1f},{end:.1f}"
    dashes = ' stroke-dasharray="4 4"' if through_cache else ""
    return f'<path d="{path}" fill="none" stroke="{_GREY}" stroke-width="1.3"{dashes} marker-end="url(#arrow)"/>'


class _Frame:
    """Around a stretch that repeats, and the lines that end in it."""

    def __init__(self, shown: _Shown, stretch: Stretch, edges: list[Edge]) -> None:
        inside = [shown.at(stretch.start + offset) for offset in range(stretch.length)]
        rows = range(min(box.row for box in inside), max(box.row for box in inside) + 1)
        around = [p for edge in edges if edge.target in inside for p in edge.points if p.row in rows]
        self.times = stretch.times
        self.left = min(box.x - box.width / 2 for box in (*inside, *around)) - _FRAME
        self.right = max(box.x + box.width / 2 for box in (*inside, *around)) + _FRAME
        self.top = min(box.band[0] for box in inside) - _FRAME + 6
        self.bottom = max(box.band[1] for box in inside) + _FRAME - 6

    def svg(self) -> str:
        shape = (
            f'x="{self.left:.1f}" y="{self.top:.1f}" width="{self.right - self.left:.1f}" '
            f'height="{self.bottom - self.top:.1f}" rx="12"'
        )
        return (
            f'<rect {shape} fill="#f8f9fa" stroke="#adb5bd" stroke-width="1.2" stroke-dasharray="2 3"/>'
            f'<text x="{self.right + 6:.1f}" y="{self.top + 18:.1f}" font-size="17" font-weight="600" fill="#495057">'
            f"×{self.times}</text>"
        )


def save_drawing(path: Path, graph: Graph, title: str) -> None:
    """Raises UsageError where the file cannot be written."""
    try:
        path.write_text(draw(graph, title), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}); give a file in a folder that is there."
        ) from None
