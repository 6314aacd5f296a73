"""Who reads whom: the drawings in the docstrings are what the algorithms show, and attention obeys the rule.

The other side here is softmax written out in float64, and the drawings themselves, parsed from the docstrings.
"""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esolm.algorithms import ar, bd3lm, esolm, mdlm
from esolm.algorithms.algorithm import Batch
from esolm.attention import PADDING, Relation, attends, attention, block_mask, picture, relation
from esolm.noise import Noise
from slow import unchecked

MASK_ID = 9
TEXT = torch.tensor([[5, 6, 7, 8]])


def drawings(module) -> list[str]:
    """The drawings of a docstring, from left to right: rows of `#` and `.`, apart by one or two spaces."""
    columns: dict[int, list[str]] = {}
    for line in inspect.getdoc(module).splitlines():
        for found in re.finditer(r"(?<!\S)[#.](?: {1,2}[#.])+(?!\S)", line):
            columns.setdefault(found.start(), []).append(found.group().replace(" ", ""))
    return ["\n".join(columns[start]) for start in sorted(columns)]


def drawn(view) -> str:
    return picture(view.stage[0], view.public[0])


def test_ar_reads_as_drawn():
    (view,) = ar.AR().views(Batch.of(TEXT), Noise(seed=0, step=0, start=0, stop=1, total=1), MASK_ID)
    assert view.tokens.tolist() == [[MASK_ID, 5, 6, 7]]
    assert [drawn(view)] == drawings(ar)


def test_mdlm_reads_as_drawn():
    clean = torch.tensor([[True, False, True, False]])
    view = mdlm.MDLM().view_of(Batch.of(TEXT), clean, torch.full((1, 1), 0.5).double(), MASK_ID)
    assert view.tokens.tolist() == [[5, MASK_ID, 7, MASK_ID]]
    assert [drawn(view)] == drawings(mdlm)


def test_bd3lm_reads_as_drawn():
    half = torch.full((1, 4), 0.5).double()
    view = bd3lm.BD3LM(block_size=2).view_of(Batch.of(TEXT), half > 1, half, MASK_ID)
    assert view.tokens.tolist() == [[MASK_ID] * 4 + [5, 6]]
    assert [drawn(view)] == drawings(bd3lm)


def test_eso_lm_reads_as_drawn():
    order, masked = torch.tensor([[2, 0, 1, 3]]), torch.tensor([[False, True, False, True]])
    shown = []
    for term in ("diffusion", "sequential"):
        for variant in ("B", "A"):
            algorithm = esolm.EsoLM(variant=variant)
            if term == "diffusion":
                view = algorithm.diffusion_of(Batch.of(TEXT), masked, order, torch.ones(1, 1).double(), MASK_ID)
                assert view.tokens.tolist() == [[7, 5, MASK_ID, MASK_ID]]
            else:
                view = algorithm.sequential_of(Batch.of(TEXT), masked, order, MASK_ID)
                assert view.tokens.tolist() == [[MASK_ID, MASK_ID, 7, 5, 6]]
                assert view.positions.tolist() == [[1, 3, 2, 0, 1]]
            assert view.term == term
            shown.append(drawn(view))
    assert shown == drawings(esolm)


STAGES = st.lists(st.integers(0, 4) | st.just(PADDING), min_size=6, max_size=6)
FLAGS = st.lists(st.booleans(), min_size=6, max_size=6)


@given(STAGES, FLAGS)
@settings(deadline=None, max_examples=60)
def test_the_rule_is_the_one_of_its_docstring(stages, flags):
    flags = [flag and stage != PADDING for flag, stage in zip(flags, stages, strict=True)]
    mask = attends(*(torch.tensor([x]) for x in (stages, flags, stages, flags)))[0].tolist()
    for q in range(6):
        for k in range(6):
            earlier = flags[k] and stages[k] < stages[q]
            assert mask[q][k] == (earlier or (stages[k] == stages[q] and flags[k] == flags[q]))
            assert not (mask[q][k] and stages[k] == PADDING and stages[q] != PADDING)


def as_mask(who: Relation, rows: int) -> torch.Tensor:
    everything = torch.ones(rows, rows, dtype=torch.bool)
    return who.mask[:, 0] if who.mask is not None else (everything.tril() if who.causal else everything)[None]


@given(st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=60)
def test_whatever_form_a_relation_takes_it_is_the_rule(rows, data):
    ranks = [list(range(rows)), [0] * rows]
    texts = st.sampled_from(ranks) | st.lists(st.integers(0, 3), min_size=rows, max_size=rows)
    flags = st.sampled_from([[True] * rows, [False] * rows]) | st.lists(st.booleans(), min_size=rows, max_size=rows)
    stage = torch.tensor(data.draw(st.lists(texts, min_size=2, max_size=2)))
    public = torch.tensor(data.draw(st.lists(flags, min_size=2, max_size=2)))
    expected = attends(stage, public, stage, public)
    assert torch.equal(as_mask(relation(stage, public), rows).expand_as(expected), expected)


def test_plain_relations_take_their_cheap_form():
    ranks, zeros, yes = torch.arange(5).expand(2, 5), torch.zeros(2, 5).long(), torch.ones(2, 5).bool()
    assert relation(ranks, yes).causal
    assert relation(zeros, ~yes) == Relation()
    assert relation(ranks, ~yes).mask is not None


def example(heads: int = 4, kv_heads: int = 4, rows: int = 6, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, rows, 8), (2, kv_heads, rows, 8), (2, kv_heads, rows, 8)]
    q, k, v = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    stage = torch.tensor([[0, 0, 1, 2, 1, 2], [3, 1, 0, 2, 4, PADDING]])
    public = torch.tensor([[True, True, True, False, False, True], [True, True, True, True, False, False]])
    return [x.to(dtype) for x in (q, k, v)], stage[:, :rows], public[:, :rows]


def written_out(q, k, v, mask):
    """Softmax attention in float64, a head and a row at a time."""
    shared = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for text in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = k[text, head // shared].double(), v[text, head // shared].double()
            for row in range(q.shape[2]):
                read = mask[text, row].nonzero()[:, 0]
                odds = (keys[read] @ q[text, head, row].double() / math.sqrt(q.shape[3])).exp()
                out[text, head, row] = (odds / odds.sum()) @ values[read]
    return out


FORMS = ["rule", "everybody", "causal", "blocks"]


def relation_of(form: str, stage, public) -> tuple[Relation, torch.Tensor]:
    rows = stage.shape[1]
    if form == "rule":
        who = relation(stage, public)
        return who, as_mask(who, rows)
    if form == "blocks":
        return Relation(blocks=block_mask(stage, public)), attends(stage, public, stage, public)
    who = Relation(causal=form == "causal")
    return who, as_mask(who, rows).expand(len(stage), -1, -1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("form", FORMS)
def test_attention_is_softmax_over_the_rows_that_are_read(form, kv_heads):
    (q, k, v), stage, public = example(kv_heads=kv_heads)
    with unchecked():  # FlexAttention traces the rule, and cannot trace a check
        who, mask = relation_of(form, stage, public)
        out = attention(q, k, v, who)
    torch.testing.assert_close(out.double(), written_out(q, k, v, mask), rtol=0, atol=1e-5)


def views():
    """Passes of training with more rows than a block of FlexAttention has, and no multiple of it; two texts padded."""
    tokens = torch.arange(300).remainder(MASK_ID).view(2, 150)
    valid = torch.arange(150) < torch.tensor([[150], [90]])
    batch, noise = (
        Batch(tokens=tokens, given=torch.zeros_like(valid), valid=valid),
        Noise(seed=1, step=0, start=0, stop=2, total=2),
    )
    for method in (ar.AR(), mdlm.MDLM(), bd3lm.BD3LM(block_size=6), esolm.EsoLM(variant="A"), esolm.EsoLM(variant="B")):
        yield from method.views(batch, noise, MASK_ID)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("view", list(views()), ids=lambda view: f"{view.term}-{view.tokens.shape[1]}")
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_block_mask_is_the_mask_where_blocks_are_many_and_the_last_is_not_full(view, kv_heads):
    generator = torch.Generator().manual_seed(0)
    texts, rows = view.tokens.shape
    q, k, v = (torch.randn(texts, heads, rows, 16, generator=generator) for heads in (2, kv_heads, kv_heads))
    with unchecked():
        ours = attention(q, k, v, Relation(blocks=block_mask(view.stage, view.public)))
    mask = attends(view.stage, view.public, view.stage, view.public)[:, None]
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=kv_heads != 2)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_a_new_block_mask_compiles_nothing_anew():
    """Every step of training has a mask of its own, which on a GPU, where attention is compiled, must cost nothing."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 160, 16, generator=generator)
    with unchecked():
        for _ in range(4):
            stage = torch.randint(0, 160, (2, 160), generator=generator)
            public = torch.rand(2, 160, generator=generator) < 0.5
            out = compiled(q, q, q, block_mask=block_mask(stage, public))
            mask = attends(stage, public, stage, public)[:, None]
            plain = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)
    assert counter.frame_count == 1
