"Pictures of a plan are to scale, and say what the plan says"
import re
from xml.etree import ElementTree
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tuneforge.packing import plan_epoch
from tuneforge.strips import PackView, bins_svg

lengths = st.lists(st.integers(1, 64), min_size=1, max_size=120)


def bars(svg):
    "(row, x, width) of the samples' blocks"
    rects = [r for r in ElementTree.fromstring(svg).iter() if r.tag.endswith("rect") and len(r)]
    return [(float(r.get("y")), float(r.get("x")), float(r.get("width"))) for r in rects]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), max_size=5), min_size=1, max_size=6))
def test_blocks_are_to_scale(bins):
    found = bars(bins_svg(bins, 100, "a & <b>", width=500))
    rows = sorted({y for y, _, _ in found})
    assert len(rows)==sum(bool(b) for b in bins)
    for y, b in zip(rows, [b for b in bins if b]):
        mine = [(x-2, w) for yy, x, w in found if yy==y]
        assert [w for _, w in mine]==pytest.approx([n*5 for n in b]) and [x for x, _ in mine]==pytest.approx(np.cumsum([0, *b[:-1]])*5)


@settings(deadline=None, max_examples=40)
@given(lengths, st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sampled_from(["fill", "tight", "single"]))
def test_a_view_says_what_the_plan_says(lengths, world, micro, way):
    plan = plan_epoch(lengths, 64, micro, world, 2, way=way)
    view = PackView(plan, step=plan.steps-1, ranks=4, bins=99)
    drawn = [s for _, b in view.rows for s in view.samples(b)]
    assert sorted(i for i, _ in drawn)==sorted(i for b in plan.order[-1].ravel() for i in plan.bin(b)) and all(lengths[i]==n for i, n in drawn)
    work = [sum(lengths[i]**2 for b in plan.order[-1, r].ravel() for i in plan.bin(b)) for r in range(world)]
    assert view.load.tolist()==pytest.approx([w*world/max(sum(work), 1) for w in work])
    for line in (l for l in repr(view).splitlines() if l.startswith("rank ")): assert len(re.search(r"[█▒·]+", line)[0])==56
    html = view._repr_html_()
    for svg in re.findall(r"<svg.*?</svg>", html, re.S): ElementTree.fromstring(svg)
    assert all(f"sample {i}: {n:,} tokens" in html for i, n in drawn) and "<script" not in html
    assert plan._repr_html_()==PackView(plan)._repr_html_()


def test_empty_room_is_dots():
    view = PackView(plan_epoch([32, 16], 64, world_size=1))
    assert "█"*28+"▒"*14+"·"*14 in repr(view) or "█"*14+"▒"*28+"·"*14 in repr(view)
