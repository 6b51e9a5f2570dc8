"""The proof of sections 1 to 6 of gflowgr.py, in their order. Every formula meets something that is
independent of it: brute force, a closed form, or golden values of the standard implementation.

    python -m pytest -q test_maths.py
"""
import inspect
import itertools
import math
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close as close

import gflowgr as g

parametrize = pytest.mark.parametrize
torch.set_num_threads(1)                        # of tensors as small as these more would be slower


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins at the same random state."""
    torch.manual_seed(0)


def near(found, expected, error):
    """Are all numbers within this error of those expected?"""
    close(found, expected, atol=error, rtol=0)


def numbers(text):
    """A tensor of the numbers in a text, in which `;` ends a row."""
    rows = [row.split() for row in text.split(";")]
    return torch.tensor([[float(number) for number in row] for row in rows]).squeeze(0)


def small_trie(n_items=30, levels=3, width=4, **options):
    """A catalogue of distinct random paths of codes."""
    paths = torch.cartesian_prod(*[torch.arange(width)] * levels)
    some = torch.randperm(len(paths))[:n_items]
    return g.Trie(paths[some], **options)


def small_policy(trie, dropout=0.0):
    """A T5 of width 16 with random weights."""
    levels = trie.codes.shape[1]
    n_codes = int(trie.codes.max()) + 1
    return g.T5(levels, n_codes, 16, 2, 8, 32, 2, dropout).eval()


class Teacher(nn.Module):
    """A collaborative model that gives these scores (B, N)."""

    def __init__(self, given):
        super().__init__()
        self.given = nn.Parameter(given)

    def scores(self, history):
        return self.given


def world(trie, history, clicked):
    """All that a method can be given: three policies that differ, a teacher, users' clicks."""
    return types.SimpleNamespace(
        trie=trie,
        history=history,
        clicked=clicked,
        policy=small_policy(trie),
        old=small_policy(trie).requires_grad_(False),
        reference=small_policy(trie).requires_grad_(False),
        teacher=Teacher(torch.randn(len(clicked), len(trie.codes))))


@pytest.fixture
def w():
    """A world of thirty items and four users, the last of whom has a short history."""
    history = torch.randint(30, (4, 5))
    history[3, 2:] = 30
    clicked = torch.randint(30, (4,))
    return world(small_trie(), history, clicked)


def ask(function, w, **more):
    """Call a function with what its arguments' names say, of a world and of `more`."""
    wanted = inspect.signature(function).parameters
    given = {name: value for name, value in vars(w).items() if name in wanted}
    return function(**given | more)


def all_log_p(policy, trie, history):
    """log p of every item (B, N)."""
    items = torch.arange(len(trie.codes)).expand(len(history), -1)
    log_pf, _ = g.path_log_probs(policy, trie, history, items)
    return log_pf.sum(-1)


def minimise(loss_of, weights, steps, rate):
    """Train weights by Adam."""
    optimiser = torch.optim.Adam(weights, rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of().mean().backward()
        optimiser.step()


# ============================================================================== 1. codes

def test_kmeans_finds_separate_clusters():
    """The best of several starts, as some end in a poor optimum."""
    centres = numbers("0 0; 10 0; 0 10")
    points = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    found = [g.kmeans(points, 3) for _ in range(8)]
    best = min(torch.cdist(centres, centre).amin(1).max() for centre in found)
    assert best < 0.1


def test_an_empty_cluster_of_kmeans_moves_to_a_point():
    points = numbers("1 2; 3 4")
    found = g.kmeans(points, 5)
    assert torch.cdist(found, points).amin(1).max() == 0


def test_quantiser_equals_brute_force():
    quantiser = g.ResidualQuantiser(3, 5, 2)
    x = torch.randn(7, 2)
    codes, value, _, residuals = quantiser(x)
    left = x
    for level, codebook in enumerate(quantiser.codebooks):
        close(residuals[level], left)
        distance = (left[:, None] - codebook).norm(dim=-1)
        nearest = distance.argmin(1)
        assert torch.equal(codes[:, level], nearest)
        left = left - codebook[nearest]
    close(value, x - left)


def test_commitment_reaches_the_encoder_from_every_level_and_a_codebook_its_own_loss():
    """And the decoder's gradient, here 1, goes straight to the encoder."""
    quantiser = g.ResidualQuantiser(3, 5, 2)
    x = torch.randn(7, 2, requires_grad=True)
    codes, value, loss, residuals = quantiser(x)
    chosen = quantiser.codebooks[torch.arange(3), codes].transpose(0, 1)
    left = x - chosen.detach().cumsum(0)                    # (L, B, d), after each level
    commitment = 0.25 * left.square().sum() / 14
    own = (chosen - residuals.detach()).square().sum() / 14
    close(loss, commitment + own)
    gradient = partial(torch.autograd.grad, inputs=[x, quantiser.codebooks])
    close(gradient(loss + value.sum()), gradient(commitment + own + x.sum()))


def test_initialisation_fits_each_level_to_what_the_one_before_left_over():
    quantiser = g.ResidualQuantiser(3, 16, 2)
    x = torch.randn(500, 2)
    quantiser.initialise(x)
    _, _, _, residuals = quantiser(x)
    size = residuals.square().mean((1, 2))
    assert (size[1:] < 0.25 * size[:-1]).all()


def test_restart_moves_dead_codes_alone_to_residuals_of_their_level():
    quantiser = g.ResidualQuantiser(2, 8, 4)
    x = torch.randn(200, 4)
    quantiser.initialise(x)
    codebooks = quantiser.codebooks.data
    codebooks[1, 3:] = 100.0
    before = codebooks.clone()
    _, _, _, residuals = quantiser(x)
    quantiser.restart_dead_codes(x)
    alive = before < 100
    assert torch.equal(codebooks[alive], before[alive])
    distance = torch.cdist(codebooks[1, 3:], residuals[1])
    assert distance.amin(1).max() < 1e-3


def test_alignment_is_the_cross_entropy_of_finding_ones_own():
    value = torch.randn(5, 3)
    collaborative = torch.randn(5, 3)
    log_p = (value @ collaborative.T).log_softmax(1)
    close(g.alignment_loss(value, collaborative), -log_p.diagonal().mean())


def test_diversity_pulls_to_a_partner_of_the_cluster_and_off_all_others():
    """Of codes 0, 3, 4 the partners are 2 and 1; the last has none."""
    codebook = torch.randn(5, 3)
    cluster = numbers("0 1 0 1 2")
    product = codebook @ codebook.T
    first = product[0, [1, 2, 3, 4]].logsumexp(0) - product[0, 2]
    second = product[3, [0, 1, 2, 4]].logsumexp(0) - product[3, 1]
    loss = g.diversity_loss(codebook, cluster, torch.tensor([0, 3, 4]))
    close(loss, (first + second) / 3)


def test_train_codes_gives_each_cluster_codes_of_its_own():
    cluster = torch.arange(120) % 6
    vectors = torch.randn(6, 8)[cluster]
    codes = g.train_codes(vectors, levels=2, size=4, epochs=60)
    alike = (codes[:, None] == codes).all(-1)
    assert torch.equal(alike, cluster[:, None] == cluster)


def test_letters_alignment_makes_collaborative_neighbours_share_codes():
    group = F.one_hot(torch.arange(120) % 6, 32).float()
    vectors = torch.cat([torch.randn(120, 4), group], 1)
    shared = []
    for collaborative in (None, 3 * group):
        codes = g.train_codes(vectors, 1, 8, 100, collaborative, alignment=1.0)
        alike = (codes == codes.T).float()
        shared.append(alike[group @ group.T > 0].mean())
    assert shared[1] > shared[0] + 0.1


def test_unique_paths_count_twins_as_brute_force_does():
    codes = torch.randint(4, (100, 2))
    seen = codes.tolist()
    expected = [[*code, seen[:item].count(code)] for item, code in enumerate(seen)]
    assert g.unique_paths(codes).tolist() == expected


# ============================================================================= 2. SASRec

def small_sasrec():
    """Of 30 items and 8 places, without dropout."""
    model = g.SASRec(30, 16, dropout=0.0, max_length=8)
    nn.init.normal_(model.item.weight[:-1])
    return model.eval()


def test_sasrecs_loss_is_the_mean_cross_entropy_of_each_next_item():
    """By what came before it alone, whatever the padding."""
    model = small_sasrec()
    row = torch.tensor([[3, 4, 5, 7, 30, 30]])
    total = 0.0
    for t in range(1, 4):
        seen = row.where(torch.arange(6) < t, 30)
        total += F.cross_entropy(model.scores(seen), row[:, t])
    loss = model.loss(row[:, :-1], row[:, 1:])
    close(loss[0], total / 3)


# ================================================================================= 3. T5

# Golden values of Hugging Face's T5ForConditionalGeneration (transformers 5.23.0): vocab 25,
# d_model 16, d_kv 8, d_ff 32, 2 + 2 layers, 2 heads, ReLU, no dropout, tied embeddings. Weight
# number k of golden_order() is 0.5 * sin(1.7 * i + k) at its i-th place, a norm's is 1 more.
# Kept are the logits of those tokens that can follow: at three steps, of two rows each.
GOLDEN_LOGITS = numbers("""
    -0.2107 -0.3462  0.5405 -0.1687 -0.3797  0.5305 -0.1256 -0.4108;
    -0.2091 -0.3647  0.5565 -0.1654 -0.3989  0.5454 -0.1207 -0.4304;
     0.0581 -0.0583 -0.0025  0.0607 -0.0553 -0.0080  0.0630 -0.0520;
     0.0141 -0.2185  0.1940  0.0337 -0.2261  0.1817  0.0530 -0.2322;
    -0.0068  0.1261 -0.1133 -0.0181  0.1306 -0.1063 -0.0293  0.1342;
    -0.0588  0.1869 -0.1193 -0.0733  0.1891 -0.1069 -0.0873  0.1900""")

# Its buckets of these distances, in the encoder and in the decoder.
DISTANCES = numbers("""-200 -127 -100 -64 -40 -21 -20 -16 -15 -9 -8 -7 -1 0
                       1 7 8 9 12 15 16 20 21 40 64 100 127 200""")
TWO_SIDED = numbers("""15 15 15 14 12 10 10 10 9 8 8 7 1 0
                       17 23 24 24 25 25 26 26 26 28 30 31 31 31""")
ONE_SIDED = numbers("""31 31 30 26 23 18 17 16 15 9 8 7 1 0
                       0 0 0 0 0 0 0 0 0 0 0 0 0 0""")


def golden_order(model):
    """Each weight, in the order in which the golden model was filled."""
    own = "attention.q attention.kv attention.o attention_norm "
    cross = "cross.q cross.kv cross.o cross_norm "
    last = "wi wo ff_norm"
    yield model.embedding.weight
    for side, names in [("encoder", own + last), ("decoder", own + cross + last)]:
        yield model.get_submodule(f"{side}_bias").weight
        for block, name in itertools.product(range(2), names.split()):
            weight = model.get_submodule(f"{side}.{block}.{name}").weight
            yield from weight.chunk(2) if "kv" in name else [weight]
        yield model.get_submodule(f"{side}_norm").weight


@torch.no_grad()
def golden_logits(temperature=1.0):
    """What the golden model says of two histories, one of them padded, and a path of each."""
    model = g.T5(3, 8, 16, 2, 8, 32, 2, 0.0, temperature)
    for k, weight in enumerate(golden_order(model)):
        place = torch.arange(weight.numel()).double()
        wave = 0.5 * torch.sin(1.7 * place + k)
        weight.copy_(wave.view(weight.shape) + (weight.dim() == 1))
    history = (torch.arange(80) * 7 % 24 + 1).view(2, 40, 1)
    history[1, 25:] = 0
    paths = numbers("0 3 12; 0 8 9").long()[:, None]
    states, _ = model.decode(paths, model.encode(history))
    return torch.cat([model.code_logits(states[:, 0, step], step) for step in range(3)])


def test_t5_is_the_standard_t5():
    near(golden_logits(), GOLDEN_LOGITS, 1e-4)


def test_temperature_divides_the_logits():
    close(golden_logits(0.7), golden_logits() / 0.7)


@parametrize("two_sided, buckets", [(True, TWO_SIDED), (False, ONE_SIDED)])
def test_relative_buckets_are_the_standard_ones(two_sided, buckets):
    found = g.relative_buckets(DISTANCES.long(), two_sided)
    assert torch.equal(found, buckets.long())


def test_dropout_is_at_all_24_places_where_t5_has_it(w):
    """Embedded, 1; the weights and the output of each attention and two of each feed-forward, 4
    of a block and 6 in the decoder; at the end, 1."""
    calls = []
    w.policy.dropout.register_forward_hook(lambda *call: calls.append(call))
    ask(all_log_p, w)
    assert len(calls) == 24


def test_dropout_keeps_its_rate_and_mean_and_draws_anew():
    dropout = g.Dropout(0.1)
    x = torch.ones(200_000)
    first = dropout(x)
    second = dropout(x)
    rate = [(y == 0).float().mean() for y in (first, second, first + second)]
    near(torch.stack(rate), numbers("0.1 0.1 0.01"), 0.003)
    near(first.mean(), torch.tensor(1.0), 0.003)


def test_dropout_is_the_same_after_its_strip_grew():
    drawn = []
    for largest in (50, 1 << 20):
        dropout = g.Dropout(0.3)
        dropout(torch.ones(largest))
        torch.manual_seed(3)
        drawn.append(dropout(torch.ones(50)))
    assert torch.equal(*drawn)


def test_rms_norm_is_torchs():
    """Of numbers so small that the 1e-6 counts."""
    norm = g.RMSNorm(12)
    nn.init.normal_(norm.weight)
    x = 1e-3 * torch.randn(5, 12)
    close(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-6))


# ===================================================================== 4. a policy on a tree

@parametrize("all_codes", [False, True])
def test_each_node_has_the_items_children_and_probabilities_of_brute_force(all_codes):
    """Over all codes by the plain softmax, else by that of the codes that lead to an item."""
    trie = small_trie(37, all_codes=all_codes)
    paths = trie.codes.tolist()
    for path, nodes in zip(paths, trie.path):
        for level in range(3):
            node = nodes[level]
            items = [other for other in paths if other[:level] == path[:level]]
            near(trie.log_leaves[node], torch.tensor(len(items)).log(), 1e-6)

            logits = torch.randn(4)
            child, log_probs = trie.log_probs(logits, node, level)
            codes = sorted({other[level] for other in items})
            assert trie.code[child[:len(codes)]].tolist() == codes
            assert child[codes.index(path[level])] == nodes[level + 1]
            expected = logits.log_softmax(0)[codes]
            if not all_codes:
                expected = expected.log_softmax(0)
            missing = (0, len(child) - len(codes))
            close(log_probs, F.pad(expected, missing, value=-torch.inf))


def test_trie_refuses_two_items_on_one_path():
    with pytest.raises(ValueError, match="3 items have only 2 different paths"):
        g.Trie(torch.tensor([[0, 1], [1, 1], [0, 1]]))


def test_every_step_equals_brute_force(w):
    """Each state is decoded by itself, after its own history without padding: so none can see
    padding, another path, or a later code."""
    trie = w.trie
    trie.all_codes = True
    items = torch.arange(30)
    log_pf, log_flow = ask(g.path_log_probs, w, items=items.expand(4, -1))
    history = w.history[3:, :2].expand(30, -1)
    memory = w.policy.encode(trie.tokens[history])
    for level in range(3):
        tokens = F.pad(trie.tokens[items, :level], (1, 0))
        states, _ = w.policy.decode(tokens[:, None], memory)
        state = states[:, 0, -1]
        code = trie.codes[:, level]
        log_p = w.policy.code_logits(state, level).log_softmax(1)
        close(log_pf[3, :, level], log_p[items, code])
        flow = w.policy.flow_head(state)[:, 0]
        node = trie.path[:, level]
        close(log_flow[3, :, level], flow + trie.log_leaves[node])


def test_probabilities_of_all_items_sum_to_one(w):
    close(ask(all_log_p, w).exp().sum(1), torch.ones(4))


def test_probabilities_and_scores_are_float32_under_bf16_autocast(w):
    with torch.autocast("cpu", torch.bfloat16):
        log_p = ask(all_log_p, w)
        scores = small_sasrec().scores(torch.tensor([[1, 2]]))
    assert log_p.dtype == scores.dtype == torch.float32
    near(log_p, ask(all_log_p, w), 0.1)


@parametrize("all_codes", [False, True])
def test_a_beam_wider_than_the_catalogue_equals_brute_force_and_is_filled_up(all_codes):
    """Brute force knows of no cache: so that one changes nothing."""
    trie = small_trie(50, 4, 3, all_codes=all_codes)
    policy = small_policy(trie)
    history = torch.randint(50, (5, 6))
    items, log_p = g.beam_search(policy, trie, history, 53)
    best = all_log_p(policy, trie, history).sort(descending=True)
    assert torch.equal(items, F.pad(best.indices, (0, 3), value=50))
    close(log_p, F.pad(best.values, (0, 3), value=-torch.inf))


def test_a_narrow_beam_finds_different_items_with_their_log_p_best_first(w):
    items, log_p = ask(g.beam_search, w, width=4)
    close(log_p, ask(all_log_p, w).gather(1, items))
    assert (log_p.diff() < 0).all()


def test_draws_follow_the_policy(w):
    """By chi-square: one of a thousand such tests would fail by chance."""
    drawn = ask(g.draw_items, w, n=20000)
    count = torch.bincount(drawn[3], minlength=30)
    expected = 20000 * ask(all_log_p, w)[3].exp()
    assert ((count - expected).square() / expected).sum() < 58.3


# ============================================================================ 5. GFlowGR

@parametrize("beta", [-0.7, 0.0, 0.7])
def test_curriculum_draws_unclicked_items_from_the_softmax_of_beta_z(beta):
    scores = numbers("0 1 3 2.5 5")
    preference = beta * (scores - scores.mean()) / scores.std()
    preference[[1, 4]] = -torch.inf
    clicked = torch.full((20000,), 1)
    drawn = g.curriculum_sample(scores.expand(20000, 5), clicked[:, None] + 3, clicked, 1, beta)
    share = torch.bincount(drawn[:, 0], minlength=5) / 20000
    near(share, preference.softmax(0), 0.015)


@parametrize("sign", [-1, 1])
def test_paths_are_the_clicked_item_and_the_easiest_or_hardest_others(w, sign):
    """Easiest where beta is very low, hardest where it is very high."""
    _, seen = ask(g.gflowgr_loss, w, beta=sign * 1e6, k=3)
    clicked = w.clicked[:, None]
    known = torch.cat([w.history, clicked], 1)
    scores = F.pad(sign * w.teacher.given, (0, 1)).scatter(1, known, -torch.inf)
    others = scores[:, :30].topk(3).indices
    assert torch.equal(seen["items"], torch.cat([clicked, others], 1))


def test_collaborative_score_by_hand():
    scores = numbers("-1 2 0; 5 5 5")
    close(g.collaborative_score(scores) * 3, numbers("0 3 1; 0 0 0"))


@parametrize("parts, expected", [
    ("aug,cs,sim", "2.9 1.2 0.5"), ("cs", "0.9 0.7 0.5"), ("aug,sim", "2 0.5 0.5")])
def test_reward_is_the_sum_of_its_parts_and_at_least_its_floor(parts, expected):
    r_aug, r_cs, r_sim = numbers("1 0 0; 0.9 0.7 0; 1 0.5 0")
    close(g.reward(r_aug, r_cs, r_sim, parts, floor=0.5), numbers(expected))


@parametrize("case", [
    "0 0 0 0  0 0",
    "2 0 0 0  4 4",
    "0 1 0 0  9 3",
    "0 0 1 0  1 1",
    "0 0 0 1  0 2"])
def test_exact_flows_balance_and_changed_ones_do_not(case):
    """What is added to log R, to each log P_F, to log F(s_0), to log F(s_1): what TB and DB are."""
    d_reward, d_step, d_root, d_flow, tb, db = numbers(case)
    trie = small_trie()
    reward = torch.rand(30)
    flow = torch.zeros(len(trie.code))
    for item, path in enumerate(trie.path):
        flow[path] += reward[item]
    log_flow = flow[trie.path].log()
    log_pf = log_flow.diff() + d_step
    log_flow[:, 0] += d_root
    log_flow[:, 1] += d_flow
    given = log_pf, log_flow[:, :-1], reward.log() + d_reward
    near(g.trajectory_balance(*given), tb.expand(30), 1e-4)
    near(g.detailed_balance(*given), db.expand(30), 1e-4)


BALANCES = [g.trajectory_balance, g.detailed_balance]


@parametrize("balance", BALANCES)
def test_a_table_learns_p_equal_to_r_over_z(balance):
    """A policy that is none of ours: logits of C codes and log F, of each node of the tree."""
    trie = small_trie(12)
    logits = torch.zeros(len(trie.code), 4, requires_grad=True)
    log_flow = torch.zeros(len(trie.code), requires_grad=True)
    log_reward = torch.randn(12)

    def steps():
        log_pf = []
        for level in range(3):
            node = trie.path[:, level]
            child, log_probs = trie.log_probs(logits[node], node, level)
            slot = trie.path[:, level + 1] - child[:, 0]
            log_pf.append(log_probs.gather(1, slot[:, None]))
        return torch.cat(log_pf, 1), log_flow[trie.path[:, :-1]]

    minimise(lambda: balance(*steps(), log_reward), [logits, log_flow], 300, 0.1)
    log_pf, _ = steps()
    near(log_pf.sum(1), log_reward.log_softmax(0), 0.01)
    near(log_flow[0], log_reward.logsumexp(0), 0.01)


@parametrize("balance", BALANCES)
def test_t5_learns_p_equal_to_r_over_z_and_log_z(balance):
    """Each history is the clicked item, so the K = 11 others are all there is. An error of 0.003
    for each item is a total variation of at most 0.018."""
    clicked = torch.tensor([3, 8])
    w = world(small_trie(12), clicked[:, None], clicked)
    loss = partial(g.gflowgr_loss, beta=0.0, k=11, balance=balance, weigh=False)
    minimise(lambda: ask(loss, w)[1]["gfn"], w.policy.parameters(), 600, 0.01)
    rewards = ask(g.all_rewards, w)
    z = rewards.sum(1, keepdim=True)
    near(ask(all_log_p, w).exp(), rewards / z, 0.003)
    _, seen = ask(loss, w)
    near(seen["log Z"], z[:, 0].log(), 0.05)


@torch.no_grad()
@parametrize("global_z", [False, True])
@parametrize("weigh", [False, True])
@parametrize("balance", BALANCES)
def test_gflowgr_loss_is_equation_7(w, balance, weigh, global_z):
    """A random path's confidence is 1 - r_cs, the clicked one's r_cs."""
    w.trie.semantic = 2
    w.policy.log_z.fill_(0.7)
    loss, seen = ask(g.gflowgr_loss, w, beta=0.0, lam=0.5, balance=balance,
                     weigh=weigh, global_z=global_z)
    items = seen["items"]
    log_pf, log_flow = ask(g.path_log_probs, w, items=items)
    if global_z:
        log_flow[..., 0] = 0.7 + math.log(30)
    log_reward = ask(g.all_rewards, w).gather(1, items).log()
    residual = balance(log_pf, log_flow, log_reward)
    if weigh:
        r_cs = g.collaborative_score(w.teacher.given).gather(1, items)
        residual[:, 0] *= r_cs[:, 0]
        residual[:, 1:] *= 1 - r_cs[:, 1:]
    close(loss, 0.5 * residual.sum(1) - log_pf[:, 0].sum(1))


def test_all_rewards_are_those_of_each_item_by_hand(w):
    """Where the last code only tells twins apart, it is no likeness."""
    w.trie.semantic = 2
    rewards = ask(g.all_rewards, w)
    for user, clicked in enumerate(w.clicked):
        scores = w.teacher.given[user].detach()
        r_cs = (scores - scores.min()) / (scores.max() - scores.min())
        same = w.trie.codes[:, :2] == w.trie.codes[clicked, :2]
        expected = r_cs + same.float().mean(1)
        expected[clicked] += 1
        close(rewards[user], expected.clamp(min=1e-4))


# ================================================================== 6. the other methods

METHODS = {
    "sft": g.sft_loss,
    "tb": partial(g.gflowgr_loss, beta=0.0),
    "db": partial(g.gflowgr_loss, beta=0.0, balance=g.detailed_balance),
    "global z": partial(g.gflowgr_loss, beta=0.0, global_z=True),
    "dpo": g.dpo_loss,
    "sdpo": partial(g.dpo_loss, negatives=3),
    "sprec": partial(g.sprec_loss, progress=0.99),
    "ipa": g.ipa_loss,
    "ppo": partial(g.policy_gradient_loss, critic=True),
    "grpo": partial(g.policy_gradient_loss, critic=False),
    "distil": g.distillation_loss}
WITHOUT = {"tb": {"log_z"}, "db": {"log_z"}, "ppo": {"log_z"}, "global z": {"flow_head.weight"}}


@parametrize("name", METHODS)
def test_all_weights_that_a_method_uses_get_a_gradient_and_the_teacher_none(w, name):
    loss, _ = ask(METHODS[name], w)
    loss.sum().backward()
    without = set()
    for weight_name, weight in w.policy.named_parameters():
        if weight.grad is None or not weight.grad.any():
            without.add(weight_name)
    assert without == WITHOUT.get(name, {"log_z", "flow_head.weight"})
    assert w.teacher.given.grad is None


@parametrize("name, expected", [("dpo", 2.0), ("sdpo", 4.0), ("grpo", 1.0)])
def test_losses_begin_at_log_1_plus_k_and_at_0_whatever_the_dropout(w, name, expected):
    """Where a policy is its own reference, all ratios are one."""
    w.policy = w.old = w.reference = small_policy(w.trie, dropout=0.5).train()
    loss, _ = ask(METHODS[name], w)
    near(loss.exp(), torch.full((4,), expected), 1e-3)


def test_dpo_and_s_dpo_by_hand():
    chosen = torch.randn(6)
    rejected = torch.randn(6, 3)
    gap = 0.7 * (rejected - chosen[:, None])
    close(g.dpo(chosen, rejected, 0.7), (1 + gap.exp().sum(1)).log())
    close(g.dpo(chosen, rejected[:, :1], 0.7), F.softplus(gap[:, 0]))


@parametrize("progress", [0.0, 0.09, 0.21])
def test_an_iteration_of_sprec_begins_with_sft(w, progress):
    loss, _ = ask(g.sprec_loss, w, progress=progress)
    plain, _ = ask(g.sft_loss, w)
    assert torch.equal(loss, plain)


@parametrize("progress", [0.11, 0.19, 0.99])
def test_sprec_then_plays_against_draws_of_the_old_policy_but_for_the_clicked_item(w, progress):
    torch.manual_seed(1)
    drawn = ask(g.draw_items, w, policy=w.old, n=1)
    w.clicked[:2] = drawn[:2, 0]
    torch.manual_seed(1)
    loss, _ = ask(g.sprec_loss, w, progress=progress, beta=0.3)
    ratio = ask(all_log_p, w) - ask(all_log_p, w, policy=w.old)
    gap = ratio.gather(1, drawn) - ratio.gather(1, w.clicked[:, None])
    expected = F.softplus(0.3 * gap[:, 0])
    expected[:2] = 0
    close(loss, expected)


def test_ipa_sets_the_item_of_best_reward_against_that_of_worst(w):
    loss, _ = ask(g.ipa_loss, w, lam=0.5)
    found, _ = ask(g.beam_search, w, policy=w.old)
    rewards = ask(g.all_rewards, w)
    log_p = ask(all_log_p, w)
    ratio = log_p - ask(all_log_p, w, policy=w.reference)
    for user in range(4):
        order = sorted(found[user], key=lambda item: rewards[user, item])
        gap = ratio[user, order[0]] - ratio[user, order[-1]]
        close(loss[user], 0.5 * F.softplus(gap) - log_p[user, w.clicked[user]])


def test_clipped_loss_has_no_gradient_where_a_ratio_went_too_far():
    log_p = numbers("1.5 0.5 1.5 0.5").log().requires_grad_()
    loss = g.clipped_loss(log_p, torch.zeros(4), log_p.detach(), numbers("1 1 -1 -1"))
    close(loss, numbers("-1.2 -0.5 1.5 0.8"))
    loss.sum().backward()
    close(log_p.grad, numbers("0 -0.5 1.5 0"))


def test_the_kl_term_is_the_divergence_on_average_and_never_negative():
    log_p, log_q = torch.randn(2, 7).log_softmax(1)
    term = g.clipped_loss(log_p, log_p, log_q, torch.zeros(7), kl=1.0)
    assert (term >= 0).all()
    close((log_p.exp() * term).sum(), F.kl_div(log_q, log_p, reduction="sum", log_target=True))


def test_group_advantage_is_the_standard_score_and_zero_for_equal_rewards():
    advantage = g.group_advantage(numbers("1 2 3 6; 1.7 1.7 1.7 1.7"))
    expected = numbers("-2 -1 0 3; 0 0 0 0") / math.sqrt(3.5)
    near(advantage, expected, 1e-3)


@parametrize("critic", [True, False])
def test_policy_gradient_loss_and_the_values_gradient_by_hand(w, critic):
    torch.manual_seed(1)
    loss, _ = ask(g.policy_gradient_loss, w, critic=critic)
    torch.manual_seed(1)
    drawn = ask(g.draw_items, w, policy=w.old, n=16)
    log_p = []
    for policy in (w.policy, w.old, w.reference):
        log_p.append(ask(all_log_p, w, policy=policy).gather(1, drawn))
    rewards = ask(g.all_rewards, w).gather(1, drawn)
    _, log_flow = ask(g.path_log_probs, w, items=drawn)
    error = rewards - log_flow[..., 0] + math.log(30)
    advantage = error.detach() if critic else g.group_advantage(rewards)
    expected = g.clipped_loss(*log_p, advantage) + critic * error.square() / 2
    expected = expected.mean(1)
    close(loss, expected)
    gradient = partial(torch.autograd.grad, inputs=w.policy.flow_head.weight)
    close(gradient(loss.sum()), gradient(expected.sum()))


@parametrize("name", ["dpo", "sprec", "ipa", "ppo", "grpo"])
def test_a_method_moves_probability_to_items_of_more_reward(w, name):
    rewards = ask(g.all_rewards, w)

    def mean_reward():
        p = ask(all_log_p, w).exp()
        return (p * rewards).sum(1).mean()

    def loss_of():
        w.old.load_state_dict(w.policy.state_dict())
        loss, _ = ask(METHODS[name], w)
        return loss

    before = mean_reward()
    minimise(loss_of, w.policy.parameters(), 60, 0.01)
    assert mean_reward() > before + 0.3


def test_distillation_is_on_average_the_cross_entropy_of_the_mixture():
    clicked = torch.full((20000,), 3)
    w = world(small_trie(8), clicked[:, None], clicked)
    scores = 2 * torch.randn(8)
    w.teacher = Teacher(scores.expand(20000, -1))
    loss, _ = ask(g.distillation_loss, w, share=0.7)
    mixture = 0.7 * scores.softmax(0)
    mixture[3] += 0.3
    log_p = all_log_p(w.policy, w.trie, w.history[:1])[0]
    near(loss.mean(), -mixture @ log_p, 0.02)
