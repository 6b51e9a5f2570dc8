"""The proof of sections 1 to 6 of gflowgr.py, in their order. Every formula meets something that is
independent of it: brute force, a closed form, or golden values of the standard implementation.

    python -m pytest -q test_maths.py
"""
import copy
import itertools
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close as close

import gflowgr as g


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins at the same random state."""
    torch.manual_seed(0)


def small_trie(n_items=30, levels=3, width=4, **options):
    """A catalogue of distinct random paths of codes."""
    code = torch.arange(width)
    paths = torch.cartesian_prod(*[code] * levels)
    some = torch.randperm(len(paths))[:n_items]
    return g.Trie(paths[some], **options)


def small_policy(trie, **size):
    """A T5 with random weights, those of its flow head included."""
    size = dict(d_model=16, heads=2, d_kv=8, d_ff=32, layers=2, dropout=0.0) | size
    policy = g.T5(trie.codes.shape[1], int(trie.codes.max()) + 1, **size)
    nn.init.normal_(policy.flow_head.weight)
    return policy.eval()


class Teacher(nn.Module):
    """A collaborative model that gives these scores (B, N)."""

    def __init__(self, given):
        super().__init__()
        self.given = nn.Parameter(given)

    def scores(self, history):
        return self.given


def world(trie, history, clicked):
    """What methods are given: three policies that differ, a teacher, and some users' clicks."""
    return types.SimpleNamespace(
        policy=small_policy(trie),
        old=small_policy(trie).requires_grad_(False),
        reference=small_policy(trie).requires_grad_(False),
        teacher=Teacher(torch.randn(len(clicked), len(trie.codes))),
        trie=trie, history=history, clicked=clicked, given=(trie, history, clicked))


@pytest.fixture
def w():
    """A world of four users, the last of whom has a short history."""
    history = torch.randint(30, (4, 5))
    history[3, 2:] = 30
    return world(small_trie(), history, torch.randint(30, (4,)))


def all_log_p(policy, trie, history):
    """log p of every item (B, N)."""
    items = torch.arange(len(trie.codes)).expand(len(history), -1)
    return g.path_log_probs(policy, trie, history, items)[0].sum(-1)


# ============================================================================== 1. codes

def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    found = [g.kmeans(points, 3) for _ in range(8)]         # some of them meet a poor optimum
    best = min(found, key=lambda centre: torch.cdist(points, centre).amin(1).sum())
    assert torch.cdist(centres, best).amin(1).max() < 0.1


def test_an_empty_cluster_of_kmeans_moves_to_a_point():
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = g.kmeans(points, 5)
    assert torch.cdist(found, points).amin(1).max() == 0


def test_quantiser_equals_brute_force():
    quantiser = g.ResidualQuantiser(3, 5, 2)
    x = torch.randn(7, 2)
    codes, value, loss, residuals = quantiser(x)
    total = 0.0
    for row in range(7):
        residual = x[row]
        for level, codebook in enumerate(quantiser.codebooks.detach()):
            close(residuals[level, row], residual)
            distance = (residual - codebook).square().sum(1)
            assert codes[row, level] == distance.argmin()
            residual = residual - codebook[distance.argmin()]
            total += 1.25 * residual.square().sum() / x.numel()
        close(value[row], x[row] - residual)
    close(loss, total)


def test_the_decoders_gradient_goes_straight_through_the_quantiser():
    x = torch.randn(7, 2, requires_grad=True)
    _, value, _, _ = g.ResidualQuantiser(3, 5, 2)(x)
    value.sum().backward()
    assert torch.equal(x.grad, torch.ones(7, 2))


def test_commitment_reaches_the_encoder_from_every_level_and_a_codebook_its_own_loss():
    quantiser = g.ResidualQuantiser(3, 5, 2)
    x = torch.randn(7, 2, requires_grad=True)
    codes, _, loss, residuals = quantiser(x)
    loss.backward()
    towards = torch.zeros(7, 2)
    for level, codebook in enumerate(quantiser.codebooks.detach()):
        left = residuals[level].detach() - codebook[codes[:, level]]
        slope = 2 * left / x.numel()
        towards += 0.25 * slope
        own = torch.zeros(5, 2).index_add(0, codes[:, level], -slope)
        close(quantiser.codebooks.grad[level], own)
    close(x.grad, towards)


def test_initialisation_fits_every_level_to_what_the_one_before_left_over():
    quantiser = g.ResidualQuantiser(3, 16, 2)
    quantiser.initialise(torch.randn(500, 2))
    x = torch.randn(500, 2)
    _, _, _, residuals = quantiser(x)
    size = residuals.square().mean((1, 2))
    assert (size[1:] < 0.25 * size[:-1]).all()


def test_restart_moves_dead_codes_alone_to_residuals_of_their_level():
    quantiser = g.ResidualQuantiser(2, 8, 4)
    x = torch.randn(200, 4)
    quantiser.initialise(x)
    with torch.no_grad():
        quantiser.codebooks[1, 3:] = 100.0
    before = quantiser.codebooks.detach().clone()
    _, _, _, residuals = quantiser(x)
    quantiser.restart_dead_codes(x)
    moved = (quantiser.codebooks != before).any(-1)
    assert moved.tolist() == [[False] * 8, [False] * 3 + [True] * 5]
    assert torch.cdist(quantiser.codebooks[1, 3:], residuals[1]).amin(1).max() < 1e-3


def test_alignment_is_the_cross_entropy_of_finding_ones_own():
    value = torch.randn(5, 3)
    collaborative = torch.randn(5, 3)
    total = 0.0
    for row in range(5):
        products = [float(value[row] @ other) for other in collaborative]
        total += math.log(sum(map(math.exp, products))) - products[row]
    assert g.alignment_loss(value, collaborative).item() == pytest.approx(total / 5, rel=1e-4)


def test_diversity_pulls_to_a_partner_of_the_cluster_and_off_all_others():
    codebook = torch.randn(5, 3)
    cluster = torch.tensor([0, 1, 0, 1, 2])
    codes = torch.tensor([0, 3, 4])             # the partners are 2 and 1; the last has none
    total = 0.0
    for own, partner in [(0, 2), (3, 1)]:
        product = {c: float(codebook[own] @ codebook[c]) for c in range(5) if c != own}
        total += math.log(sum(map(math.exp, product.values()))) - product[partner]
    loss = g.diversity_loss(codebook, cluster, codes)
    assert loss.item() == pytest.approx(total / 3, rel=1e-4)


def test_diversity_draws_any_other_code_of_the_cluster():
    cluster = torch.zeros(5, dtype=torch.long)
    codebook = torch.randn(5, 3)
    code = torch.tensor([0])
    losses = {g.diversity_loss(codebook, cluster, code).item() for _ in range(60)}
    assert len(losses) == 4


def test_train_codes_gives_clusters_codes_of_their_own():
    cluster = torch.arange(120) % 6
    vectors = torch.randn(6, 8)[cluster] + 0.01 * torch.randn(120, 8)
    codes = g.train_codes(vectors, levels=2, size=8, epochs=60)
    used = {(int(c), *code) for c, code in zip(cluster, codes.tolist())}
    assert len(used) < 15 and len({code for _, *code in map(tuple, used)}) == len(used)


def test_letters_alignment_makes_neighbours_share_codes():
    groups = torch.arange(120) % 6
    vectors = torch.randn(120, 6)                           # which know nothing of the groups
    collaborative = 3 * F.one_hot(groups, 32) + 0.3 * torch.randn(120, 32)
    same_group = groups[:, None] == groups
    shared = []
    for letter in (None, collaborative):
        codes = g.train_codes(vectors, 2, 12, 300, letter, alignment=1.0)
        same_code = (codes[:, None] == codes).float().mean(-1)
        shared.append(same_code[same_group].mean())
    assert shared[1] > shared[0] + 0.2


def test_unique_paths_count_twins_by_hand():
    codes = torch.tensor([[3, 1], [3, 1], [0, 2], [3, 1]])
    assert g.unique_paths(codes).tolist() == [[3, 1, 0], [3, 1, 1], [0, 2, 0], [3, 1, 2]]


def test_unique_paths_equal_brute_force():
    codes = torch.randint(4, (100, 2))
    seen = codes.tolist()
    count = [seen[:item].count(code) for item, code in enumerate(seen)]
    expected = torch.cat([codes, torch.tensor(count)[:, None]], 1)
    assert torch.equal(g.unique_paths(codes), expected)


# ============================================================================= 2. SASRec

def small_sasrec():
    """Of 30 items and 8 places, without dropout."""
    model = g.SASRec(30, 16, dropout=0.0, max_length=8)
    nn.init.normal_(model.item.weight[:-1])
    return model.eval()


def test_sasrec_is_causal():
    model = small_sasrec()
    history = torch.randint(30, (4, 6))
    changed = history.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 30
    difference = (model(changed) - model(history)).abs().amax((0, 2))
    assert (difference > 1e-4).tolist() == 3 * [False] + 3 * [True]


def test_sasrec_is_blind_to_padding():
    model = small_sasrec()
    history = torch.randint(30, (4, 6))
    close(model.scores(F.pad(history, (0, 2), value=30)), model.scores(history))


def test_sasrec_loss_is_the_mean_cross_entropy_of_every_next_item():
    model = small_sasrec()
    history = torch.tensor([[3, 4, 5], [6, 30, 30]])
    target = torch.tensor([[4, 5, 7], [8, 30, 30]])

    def surprise(seen, item):
        log_p = model.scores(torch.tensor([seen])).log_softmax(1)
        return -log_p[0, item]

    first = (surprise([3], 4) + surprise([3, 4], 5) + surprise([3, 4, 5], 7)) / 3
    close(model.loss(history, target), torch.stack([first, surprise([6], 8)]))


# ================================================================================= 3. T5

# Golden values of Hugging Face's T5ForConditionalGeneration (transformers 5.23.0): vocab 25,
# d_model 16, d_kv 8, d_ff 32, 2 + 2 layers, 2 heads, ReLU, no dropout, tied embeddings. Weight
# number k of golden_order() is 0.5 * sin(1.7 * i + k) at its i-th place, a norm's is 1 more.
# Kept are the logits of those tokens that can follow, of two rows at three steps.
GOLDEN_LOGITS = [
    [[-0.2107, -0.3462, 0.5405, -0.1687, -0.3797, 0.5305, -0.1256, -0.4108],
     [0.0581, -0.0583, -0.0025, 0.0607, -0.0553, -0.008, 0.063, -0.052],
     [-0.0068, 0.1261, -0.1133, -0.0181, 0.1306, -0.1063, -0.0293, 0.1342]],
    [[-0.2091, -0.3647, 0.5565, -0.1654, -0.3989, 0.5454, -0.1207, -0.4304],
     [0.0141, -0.2185, 0.194, 0.0337, -0.2261, 0.1817, 0.053, -0.2322],
     [-0.0588, 0.1869, -0.1193, -0.0733, 0.1891, -0.1069, -0.0873, 0.19]]]

# Hugging Face's buckets of these distances, for its encoder and for its decoder.
DISTANCES = [-200, -127, -100, -64, -40, -21, -16, -15, -9, -8, -7, -1, 0,
             1, 7, 8, 9, 12, 15, 16, 21, 40, 64, 100, 127, 200]
TWO_SIDED = [15, 15, 15, 14, 12, 10, 10, 9, 8, 8, 7, 1, 0,
             17, 23, 24, 24, 25, 25, 26, 26, 28, 30, 31, 31, 31]
ONE_SIDED = [31, 31, 30, 26, 23, 18, 16, 15, 9, 8, 7, 1] + [0] * 14


def golden_order(model):
    """Each weight, in the order in which the golden model was filled."""
    yield model.embedding.weight
    for side in ("encoder", "decoder"):
        yield getattr(model, f"{side}_bias").weight
        for block in getattr(model, side):
            for attention, norm in zip([block.attention, block.cross], block.norms[:-1]):
                keys, values = attention.kv.weight.chunk(2)
                yield from (attention.q.weight, keys, values, attention.o.weight, norm.weight)
            yield from (block.wi.weight, block.wo.weight, block.norms[-1].weight)
        yield getattr(model, f"{side}_norm").weight


@torch.no_grad()
def golden_logits(**options):
    """What the golden model says of two histories (one is padded) and a path of each."""
    model = g.T5(3, 8, 16, heads=2, d_kv=8, d_ff=32, layers=2, dropout=0.0, **options)
    for k, weight in enumerate(golden_order(model)):
        place = torch.arange(weight.numel(), dtype=torch.float64)
        wave = 0.5 * torch.sin(1.7 * place + k)
        weight.copy_(wave.view(weight.shape) + (weight.dim() == 1))
    source = (torch.arange(80) * 7 % 24 + 1).view(2, 40, 1)
    source[1, 25:] = 0
    paths = torch.tensor([[[0, 3, 12]], [[0, 8, 9]]])
    states, _ = model.decode(paths, model.encode(source))
    return torch.stack([model.code_logits(states[:, 0, step], step) for step in range(3)], 1)


def test_t5_is_the_standard_t5():
    close(golden_logits(), torch.tensor(GOLDEN_LOGITS), atol=1e-4, rtol=0)


def test_temperature_divides_the_logits():
    close(golden_logits(temperature=0.7), golden_logits() / 0.7)


@pytest.mark.parametrize("two_sided, buckets", [(True, TWO_SIDED), (False, ONE_SIDED)])
def test_relative_buckets_are_the_standard_ones(two_sided, buckets):
    assert g.relative_buckets(torch.tensor(DISTANCES), two_sided).tolist() == buckets


def test_memory_is_blind_to_padding(w):
    padded = F.pad(w.history, (0, 3), value=30)
    close(all_log_p(w.policy, w.trie, padded), all_log_p(w.policy, w.trie, w.history))


def test_paths_are_blind_to_each_other(w):
    items = torch.randint(30, (4, 3))
    together = g.path_log_probs(w.policy, w.trie, w.history, items)
    for path in range(3):
        alone = g.path_log_probs(w.policy, w.trie, w.history, items[:, [path]])
        close(alone[0][:, 0], together[0][:, path])
        close(alone[1][:, 0], together[1][:, path])


def test_the_decoder_is_causal(w):
    memory = w.policy.encode(w.trie.tokens[w.history])
    tokens = torch.randint(1, 13, (4, 2, 5))
    changed = tokens.clone()
    changed[..., 2] = changed[..., 2] % 12 + 1
    before, _ = w.policy.decode(tokens, memory)
    after, _ = w.policy.decode(changed, memory)
    difference = (after - before).abs().amax((0, 1, 3))
    assert (difference > 1e-4).tolist() == 2 * [False] + 3 * [True]


def test_the_decoders_cache_changes_nothing(w):
    memory = w.policy.encode(w.trie.tokens[w.history])
    tokens = torch.randint(1, 13, (4, 2, 5))
    whole, _ = w.policy.decode(tokens, memory)
    past = None
    for step in range(5):
        state, past = w.policy.decode(tokens[..., [step]], memory, past)
        close(state[:, :, 0], whole[:, :, step])


def test_dropout_is_wherever_t5_has_it(w):
    calls = []
    w.policy.dropout.register_forward_hook(lambda *call: calls.append(call))
    all_log_p(w.policy, w.trie, w.history)
    encoder = 1 + 2 * 4 + 1             # embedded; attention, its output, feed-forward twice; at the end
    decoder = 1 + 2 * 6 + 1
    assert len(calls) == encoder + decoder


def test_dropout_keeps_its_rate_and_mean_and_draws_anew():
    dropout = g.Dropout(0.1)
    x = torch.ones(400, 500)
    first = dropout(x)
    second = dropout(x)
    both = (first == 0) & (second == 0)
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert first.mean().item() == pytest.approx(1, abs=0.005)
    assert both.float().mean().item() == pytest.approx(0.01, abs=0.002)


def test_dropout_is_the_same_after_its_strip_grew():
    drawn = []
    for largest in (50, 1 << 20):
        dropout = g.Dropout(0.3)
        dropout(torch.ones(largest))
        torch.manual_seed(3)
        drawn.append(dropout(torch.ones(50)))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_rms_norm_is_torchs(dtype, tolerance):
    norm = g.RMSNorm(12)
    nn.init.normal_(norm.weight)
    x = 1e-3 * torch.randn(3, 5, 12).to(dtype)              # so small that the 1e-6 counts
    expected = F.rms_norm(x, (12,), norm.weight.to(dtype), 1e-6)
    close(norm(x), expected, atol=tolerance, rtol=tolerance)


# ===================================================================== 4. a policy on a tree

def test_trie_holds_exactly_the_items():
    trie = small_trie(37)
    paths = trie.codes.tolist()
    for item, path in enumerate(paths):
        node = torch.tensor(0)
        for level, code in enumerate(path):
            assert trie.path[item, level] == node
            child, log_probs = trie.log_probs(torch.zeros(4), node, level)
            child = child[log_probs > -torch.inf]
            below = {other[level] for other in paths if other[:level] == path[:level]}
            assert trie.code[child].tolist() == sorted(below)
            node = child[sorted(below).index(code)]
        assert trie.leaf_item[node - len(trie.first_child)] == item


def test_trie_refuses_two_items_on_one_path():
    with pytest.raises(ValueError, match="3 items have only 2 different paths"):
        g.Trie(torch.tensor([[0, 1], [1, 1], [0, 1]]))


@pytest.mark.parametrize("all_codes", [False, True])
def test_path_log_probs_equal_brute_force_step_by_step(w, all_codes):
    trie = g.Trie(w.trie.codes, all_codes=all_codes)
    items = torch.randint(30, (4, 3))
    log_pf, log_flow = g.path_log_probs(w.policy, trie, w.history, items)
    paths = trie.codes.tolist()
    memory = w.policy.encode(trie.tokens[w.history])
    for user, place in itertools.product(range(4), range(3)):
        path = paths[items[user, place]]
        tokens = [0]
        for level, code in enumerate(path):
            states, _ = w.policy.decode(torch.tensor(tokens).expand(4, 1, -1), memory)
            state = states[user, 0, -1]
            logits = w.policy.code_logits(state, level)
            below = [other for other in paths if other[:level] == path[:level]]
            allowed = range(4) if all_codes else sorted({other[level] for other in below})
            step = logits[code] - logits[list(allowed)].logsumexp(0)
            flow = w.policy.flow_head(state)[0] + math.log(len(below))
            close(log_pf[user, place, level], step, atol=1e-5, rtol=1e-5)
            close(log_flow[user, place, level], flow, atol=1e-5, rtol=1e-5)
            tokens.append(1 + 4 * level + code)


def test_probabilities_of_all_items_sum_to_one_in_float32_under_bf16_autocast(w):
    with torch.autocast("cpu", torch.bfloat16):
        log_p = all_log_p(w.policy, w.trie, w.history)
    assert log_p.dtype == torch.float32
    close(log_p.exp().sum(1), torch.ones(4))
    close(log_p, all_log_p(w.policy, w.trie, w.history), atol=0.1, rtol=0)


def test_sasrecs_scores_are_float32_under_bf16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert small_sasrec().scores(torch.tensor([[1, 2]])).dtype == torch.float32


@pytest.mark.parametrize("levels, width", [(3, 4), (2, 6), (4, 3)])
@pytest.mark.parametrize("all_codes", [False, True])
def test_a_beam_as_wide_as_the_catalogue_equals_brute_force(levels, width, all_codes):
    trie = small_trie(30, levels, width, all_codes=all_codes)
    policy = small_policy(trie)
    history = torch.randint(30, (5, 6))
    best = all_log_p(policy, trie, history).sort(descending=True)
    items, log_p = g.beam_search(policy, trie, history, 30)
    assert torch.equal(items, best.indices)
    close(log_p, best.values)


def test_a_narrow_beam_equals_brute_force(w):
    items, log_p = g.beam_search(w.policy, w.trie, w.history, 4)
    everything = torch.arange(30).expand(4, -1)
    log_pf, _ = g.path_log_probs(w.policy, w.trie, w.history, everything)
    paths = w.trie.codes.tolist()
    for user in range(4):
        beams = [()]
        for level in range(1, 4):
            reached = {}
            for path, steps in zip(paths, log_pf[user]):
                if tuple(path[:level - 1]) in beams:
                    reached[tuple(path[:level])] = float(steps[:level].sum())
            beams = sorted(reached, key=reached.get, reverse=True)[:4]
        assert [tuple(paths[item]) for item in items[user]] == beams
        assert log_p[user].tolist() == pytest.approx([reached[beam] for beam in beams])


def test_a_beam_wider_than_the_catalogue_is_filled_up():
    trie = small_trie(6)
    items, log_p = g.beam_search(small_policy(trie), trie, torch.tensor([[0], [1]]), 9)
    for row in items.tolist():
        assert sorted(row[:6]) == list(range(6))
    assert (items[:, 6:] == 6).all()
    assert torch.equal(log_p == -torch.inf, items == 6)


def test_draws_follow_the_policy():
    trie = small_trie(8)
    policy = small_policy(trie)
    history = torch.tensor([[0, 1]])
    drawn = g.draw_items(policy, trie, history, 20000)
    count = torch.bincount(drawn[0], minlength=8)
    expected = 20000 * all_log_p(policy, trie, history).exp()[0]
    chi_square = ((count - expected).square() / expected).sum()
    assert chi_square < 24.3                    # in one of a thousand cases of 7 degrees of freedom


# ============================================================================ 5. GFlowGR

@pytest.mark.parametrize("beta", [-0.7, 0.0, 0.7])
def test_curriculum_draws_unclicked_items_from_the_softmax_of_beta_z(beta):
    scores = torch.tensor([0.0, 1.0, 3.0, 2.5, 5.0])
    history = torch.tensor([[4, 5]]).expand(20000, -1)
    clicked = torch.full((20000,), 1)
    drawn = g.curriculum_sample(scores.expand(20000, -1), history, clicked, 1, beta)
    share = torch.bincount(drawn[:, 0], minlength=5) / 20000
    preference = beta * (scores - scores.mean()) / scores.std()
    preference[[1, 4]] = -torch.inf
    close(share, preference.softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_curriculum_takes_the_easiest_or_the_hardest_where_beta_is_large(w, sign):
    scores = w.teacher.given.detach()
    drawn = g.curriculum_sample(scores, w.history, w.clicked, 3, sign * 1e6)
    for user in range(4):
        known = {*w.history[user].tolist(), int(w.clicked[user])}
        order = (sign * scores[user]).argsort(descending=True).tolist()
        assert drawn[user].tolist() == [item for item in order if item not in known][:3]


def test_curriculum_draws_different_items_from_one_pool_of_the_batch():
    scores = torch.randn(50, 40)
    clicked = torch.zeros(50, dtype=torch.long)
    drawn = g.curriculum_sample(scores, clicked[:, None], clicked, 4, 1.0, pool=8)
    assert 4 < len(drawn.unique()) <= 8
    assert all(len(set(row)) == 4 for row in drawn.tolist())


def rewards_by_hand(trie, scores, item, clicked):
    """r_aug, r_cs, r_sim of one item, scores (N,) being the collaborative model's."""
    codes = trie.codes[:, :trie.semantic].tolist()
    same = [mine == its for mine, its in zip(codes[item], codes[clicked])]
    r_aug = float(item == clicked)
    r_cs = float((scores[item] - scores.min()) / (scores.max() - scores.min()))
    return r_aug, r_cs, sum(same) / len(same)


def test_collaborative_score_by_hand():
    scores = torch.tensor([[-1.0, 2.0, 0.0], [5.0, 5.0, 5.0]])
    close(g.collaborative_score(scores), torch.tensor([[0, 1, 1 / 3], [0, 0, 0]]))


def test_code_similarity_by_hand():
    codes = torch.tensor([[[1, 2, 3, 4], [1, 2, 0, 4], [5, 2, 7, 8]]])
    assert g.code_similarity(codes, codes[:, 0]).tolist() == [[1.0, 0.75, 0.25]]


@pytest.mark.parametrize("parts, expected", [
    ("aug,cs,sim", [2.9, 1.0, 0.5]), ("cs", [0.9, 0.5, 0.5]), ("aug,sim", [2.0, 0.5, 0.5])])
def test_reward_by_hand_and_at_least_its_floor(parts, expected):
    r_aug = torch.tensor([1.0, 0.0, 0.0])
    r_cs = torch.tensor([0.9, 0.5, 0.0])
    r_sim = torch.tensor([1.0, 0.5, 0.0])
    close(g.reward(r_aug, r_cs, r_sim, parts, floor=0.5), torch.tensor(expected))


def test_confidence_by_hand():
    weight = g.confidence(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.9, 0.7, 0.1]))
    close(weight, torch.tensor([0.9, 0.3, 0.9]))


@pytest.mark.parametrize("d_pf, d_flow, d_reward, tb, db", [
    (0, [0, 0, 0], 0, 0, 0), (0, [0, 0, 0], 2, 4, 4), (1, [0, 0, 0], 0, 9, 3),
    (0, [0, 1, 0], 0, 0, 2), (0, [1, 0, 0], 0, 1, 1)])
def test_exact_flows_balance_and_changed_ones_do_not(d_pf, d_flow, d_reward, tb, db):
    trie = small_trie()
    log_reward = torch.randn(30).double()
    flow = torch.zeros(len(trie.code)).double()
    for item, path in enumerate(trie.path):
        flow[path] += log_reward[item].exp()
    flow = flow.log()[trie.path]                            # (N, L + 1)
    log_pf = flow.diff() + d_pf
    log_flow = flow[:, :-1] + torch.tensor(d_flow)
    log_reward = log_reward + d_reward
    for balance, residual in [(g.trajectory_balance, tb), (g.detailed_balance, db)]:
        expected = torch.full((30,), residual).double()
        close(balance(log_pf, log_flow, log_reward), expected)


BALANCES = [g.trajectory_balance, g.detailed_balance]


class Table(nn.Module):
    """A policy that is none of ours: logits and log F of each inner node of the tree."""

    def __init__(self, trie):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(trie.first_child), 4))
        self.log_flow = nn.Parameter(torch.zeros(len(trie.first_child)))

    def forward(self, trie):
        """log P_F and log F along the paths of all items, (N, L) each."""
        log_pf = []
        for level, (node, after) in enumerate(itertools.pairwise(trie.path.T)):
            _, log_probs = trie.log_probs(self.logits[node], node, level)
            slot = after - trie.first_child[node]
            log_pf.append(log_probs.gather(1, slot[:, None]))
        return torch.cat(log_pf, 1), self.log_flow[trie.path[:, :-1]]


@pytest.mark.parametrize("balance", BALANCES)
def test_a_table_learns_p_equal_to_r_over_z(balance):
    trie = small_trie(12)
    table = Table(trie)
    log_reward = torch.randn(12)
    optimiser = torch.optim.Adam(table.parameters(), 0.1)
    for _ in range(300):
        log_pf, log_flow = table(trie)
        optimiser.zero_grad()
        balance(log_pf, log_flow, log_reward).mean().backward()
        optimiser.step()
    close(log_pf.sum(1).exp(), log_reward.softmax(0), atol=1e-3, rtol=0)
    close(log_flow[0, 0], log_reward.logsumexp(0), atol=1e-2, rtol=0)


@pytest.mark.parametrize("balance", BALANCES)
def test_t5_learns_p_equal_to_r_over_z_and_log_z(balance):
    trie = small_trie(12)
    policy = small_policy(trie, d_model=32, layers=1)
    teacher = Teacher(torch.randn(2, 12))
    clicked = torch.tensor([3, 8])
    history = clicked[:, None]                  # so the K = 11 others are all there is
    optimiser = torch.optim.Adam(policy.parameters(), 0.01, (0.9, 0.95))
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, 400)
    for _ in range(400):
        optimiser.zero_grad()
        _, seen = g.gflowgr_loss(policy, teacher, trie, history, clicked, 0.0, 11,
                                 balance=balance, weigh=False)
        seen["gfn"].mean().backward()
        optimiser.step()
        rate.step()
    rewards = g.all_rewards(teacher, trie, history, clicked)
    z = rewards.sum(1, keepdim=True)
    distance = all_log_p(policy, trie, history).exp() - rewards / z
    assert 0.5 * distance.abs().sum(1).max() < 0.02         # total variation
    close(seen["log Z"], z[:, 0].log(), atol=0.05, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("global_z", [False, True])
@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("balance", BALANCES)
def test_gflowgr_loss_is_equation_7(w, balance, weigh, global_z):
    w.trie.semantic = 2                         # the last code only tells twins apart
    w.policy.log_z.fill_(0.7)
    loss, seen = g.gflowgr_loss(w.policy, w.teacher, *w.given, 0.0, 3, 0.5, balance,
                                weigh=weigh, global_z=global_z)
    log_pf, log_flow = g.path_log_probs(w.policy, w.trie, w.history, seen["items"])
    if global_z:
        log_flow[..., 0] = 0.7 + math.log(30)
    for user in range(4):
        scores = w.teacher.given[user]
        total = -log_pf[user, 0].sum()
        for path, item in enumerate(seen["items"][user]):
            parts = rewards_by_hand(w.trie, scores, item, w.clicked[user])
            log_reward = torch.tensor(sum(parts)).log()
            weight = 1 - abs(parts[0] - parts[1]) if weigh else 1
            residual = balance(log_pf[user, path], log_flow[user, path], log_reward)
            total = total + 0.5 * weight * residual
        close(loss[user], total)


@pytest.mark.parametrize("beta", [-1e6, 1e6])
def test_paths_are_the_clicked_item_and_then_those_of_the_curriculum(w, beta):
    _, seen = g.gflowgr_loss(w.policy, w.teacher, *w.given, beta, 3)
    drawn = g.curriculum_sample(w.teacher.given, w.history, w.clicked, 3, beta)
    assert torch.equal(seen["items"], torch.cat([w.clicked[:, None], drawn], 1))


def test_all_rewards_equal_those_of_each_item_by_hand(w):
    w.trie.semantic = 2
    rewards = g.all_rewards(w.teacher, *w.given)
    for user, item in itertools.product(range(4), range(30)):
        parts = rewards_by_hand(w.trie, w.teacher.given[user], item, w.clicked[user])
        assert rewards[user, item].item() == pytest.approx(sum(parts), rel=1e-4)


# ================================================================== 6. the other methods

METHODS = {
    "sft": lambda w: g.sft_loss(w.policy, *w.given),
    "tb": lambda w: g.gflowgr_loss(w.policy, w.teacher, *w.given, 0.0),
    "db": lambda w: g.gflowgr_loss(w.policy, w.teacher, *w.given, 0.0, balance=BALANCES[1]),
    "global z": lambda w: g.gflowgr_loss(w.policy, w.teacher, *w.given, 0.0, global_z=True),
    "dpo": lambda w: g.dpo_loss(w.policy, w.reference, *w.given),
    "sdpo": lambda w: g.dpo_loss(w.policy, w.reference, *w.given, negatives=3),
    "sprec": lambda w: g.sprec_loss(w.policy, w.old, *w.given, 0.99),
    "ipa": lambda w: g.ipa_loss(w.policy, w.old, w.reference, w.teacher, *w.given),
    "ppo": lambda w: g.policy_gradient_loss(
        w.policy, w.old, w.reference, w.teacher, *w.given, True),
    "grpo": lambda w: g.policy_gradient_loss(
        w.policy, w.old, w.reference, w.teacher, *w.given, False),
    "distil": lambda w: g.distillation_loss(w.policy, w.teacher, *w.given)}
WITHOUT = {"tb": {"log_z"}, "db": {"log_z"}, "ppo": {"log_z"}, "global z": {"flow_head.weight"}}


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_that_a_method_uses_gets_a_gradient_and_no_teacher(w, name):
    loss, _ = METHODS[name](w)
    assert loss.shape == (4,)
    loss.sum().backward()
    without = {weight for weight, value in w.policy.named_parameters()
               if value.grad is None or not value.grad.any()}
    assert without == WITHOUT.get(name, {"log_z", "flow_head.weight"})
    assert w.teacher.given.grad is None


@pytest.mark.parametrize("name, expected", [
    ("dpo", [math.log(2)]), ("sdpo", [math.log(4)]), ("sprec", [0, math.log(2)]), ("grpo", [0])])
def test_ratios_to_a_copy_are_one_whatever_the_dropout(w, name, expected):
    w.policy = small_policy(w.trie, dropout=0.5)
    w.old = w.reference = copy.deepcopy(w.policy)
    w.policy.train()
    loss, _ = METHODS[name](w)
    for value in loss.tolist():
        assert min(abs(value - one) for one in expected) < 1e-4


def test_s_dpo_by_hand():
    chosen = torch.randn(6)
    rejected = torch.randn(6, 3)
    loss = g.dpo(chosen, rejected, 0.7)
    for row in range(6):
        odds = [math.exp(0.7 * (other - chosen[row])) for other in rejected[row]]
        assert loss[row].item() == pytest.approx(math.log(1 + sum(odds)), rel=1e-4)


def test_s_dpo_with_one_negative_is_dpo():
    chosen = torch.randn(6)
    rejected = torch.randn(6, 1)
    close(g.dpo(chosen, rejected, 0.7), F.softplus(0.7 * (rejected[:, 0] - chosen)))


def test_dpo_sets_the_clicked_item_against_an_unclicked_one(w):
    ratio = all_log_p(w.policy, *w.given[:2]) - all_log_p(w.reference, *w.given[:2])
    loss, _ = METHODS["dpo"](w)
    for user in range(4):
        known = {*w.history[user].tolist(), int(w.clicked[user])}
        others = [item for item in range(30) if item not in known]
        possible = F.softplus(ratio[user, others] - ratio[user, w.clicked[user]])
        assert (possible - loss[user]).abs().min() < 1e-4


@pytest.mark.parametrize("progress, is_sft", [
    (0.0, True), (0.09, True), (0.11, False), (0.19, False), (0.21, True), (0.99, False)])
def test_an_iteration_of_sprec_is_sft_and_then_dpo(w, progress, is_sft):
    loss, _ = g.sprec_loss(w.policy, w.old, *w.given, progress)
    plain, _ = g.sft_loss(w.policy, *w.given)
    assert torch.equal(loss, plain) == is_sft


def test_sprec_plays_against_draws_of_the_old_policy_but_the_clicked_item(w):
    torch.manual_seed(1)
    drawn = g.draw_items(w.old, w.trie, w.history, 1)
    w.clicked[:2] = drawn[:2, 0]
    torch.manual_seed(1)
    loss, _ = g.sprec_loss(w.policy, w.old, *w.given, 0.99, beta=0.3)
    ratio = all_log_p(w.policy, *w.given[:2]) - all_log_p(w.old, *w.given[:2])
    gap = ratio.gather(1, drawn) - ratio.gather(1, w.clicked[:, None])
    expected = F.softplus(0.3 * gap[:, 0])
    expected[:2] = 0
    close(loss, expected)


def test_ipa_sets_the_item_of_best_reward_against_that_of_worst(w):
    loss, _ = g.ipa_loss(w.policy, w.old, w.reference, w.teacher, *w.given, lam=0.5)
    found, _ = g.beam_search(w.old, w.trie, w.history, 20)
    rewards = g.all_rewards(w.teacher, *w.given)
    log_p = all_log_p(w.policy, *w.given[:2])
    ratio = log_p - all_log_p(w.reference, *w.given[:2])
    for user in range(4):
        order = sorted(found[user], key=lambda item: rewards[user, item])
        gap = ratio[user, order[0]] - ratio[user, order[-1]]
        close(loss[user], 0.5 * F.softplus(gap) - log_p[user, w.clicked[user]])


def test_clipped_loss_and_its_gradient_by_hand():
    log_p = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = g.clipped_loss(log_p, torch.zeros(4), log_p.detach(), advantage, kl=0.0)
    close(loss, torch.tensor([-1.2, -0.5, 1.5, 0.8]))
    loss.sum().backward()
    close(log_p.grad, torch.tensor([0, -0.5, 1.5, 0]))      # none where it went too far


def test_the_kl_term_is_the_divergence_on_average_and_never_negative():
    p = torch.randn(7).softmax(0)
    q = torch.randn(7).softmax(0)
    term = g.clipped_loss(p.log(), p.log(), q.log(), torch.zeros(7), kl=1.0)
    assert (term >= 0).all()
    close((p * term).sum(), (p * (p / q).log()).sum())


def test_group_advantage_is_the_standard_score_and_zero_for_equal_rewards():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [1.7, 1.7, 1.7, 1.7]])
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]]) / math.sqrt(3.5)
    close(g.group_advantage(rewards), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_policy_gradient_loss_by_hand(w, name):
    torch.manual_seed(1)
    loss, _ = METHODS[name](w)
    torch.manual_seed(1)
    drawn = g.draw_items(w.old, w.trie, w.history, 16)
    log_p, log_old, log_ref = (all_log_p(policy, *w.given[:2]).gather(1, drawn)
                               for policy in (w.policy, w.old, w.reference))
    _, log_flow = g.path_log_probs(w.policy, w.trie, w.history, drawn)
    rewards = g.all_rewards(w.teacher, *w.given).gather(1, drawn)
    error = rewards - (log_flow[..., 0] - math.log(30))
    if name == "ppo":
        expected = g.clipped_loss(log_p, log_old, log_ref, error) + 0.5 * error.square()
    else:
        expected = g.clipped_loss(log_p, log_old, log_ref, g.group_advantage(rewards))
    close(loss, expected.mean(1))


@pytest.mark.parametrize("name", ["dpo", "sprec", "ipa", "ppo", "grpo"])
def test_a_method_moves_probability_to_the_better_of_two_items(name):
    clicked = torch.zeros(16, dtype=torch.long)
    w = world(g.Trie(torch.tensor([[0, 1], [1, 0]])), clicked[:, None], clicked)
    w.old = copy.deepcopy(w.policy)
    before = all_log_p(w.policy, w.trie, w.history)[0].exp()
    optimiser = torch.optim.Adam(w.policy.parameters(), 0.01)
    for step in range(80):
        optimiser.zero_grad()
        loss, _ = METHODS[name](w)
        loss.mean().backward()
        optimiser.step()
        if step % 8 == 0:
            w.old.load_state_dict(w.policy.state_dict())
    after = all_log_p(w.policy, w.trie, w.history)[0].exp()
    assert after[0] > max(0.9, before[0])


def test_ppos_value_moves_to_the_reward():
    ...


def test_distillation_is_on_average_the_cross_entropy_of_the_mixture():
    trie = small_trie(8)
    policy = small_policy(trie)
    history = torch.tensor([[1, 2]]).expand(20000, -1)
    scores = 2 * torch.randn(8)
    clicked = torch.full((20000,), 3)
    teacher = Teacher(scores.expand(20000, -1))
    with torch.no_grad():
        loss, _ = g.distillation_loss(policy, teacher, trie, history, clicked, share=0.7)
    mixture = 0.7 * scores.softmax(0) + 0.3 * F.one_hot(torch.tensor(3), 8)
    expected = -(mixture * all_log_p(policy, trie, history[:1])[0]).sum()
    close(loss.mean(), expected, atol=0.02, rtol=0)
