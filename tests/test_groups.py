"""The mathematics: multiplication tables, irreps, change of basis, actions on images."""

import copy
import itertools
import pickle

import pytest
import torch

from deit.groups import FLOP, FLOP_X_FLOP, OCTIC, Group, Irrep, Rep

GROUPS = pytest.mark.parametrize("group", [FLOP, FLOP_X_FLOP, OCTIC], ids=lambda g: g.name)


@GROUPS
def test_table_is_a_group_and_irreps_are_orthogonal_homomorphisms(group: Group):
    n = range(group.order)
    for g in n:
        assert group.table[0][g] == g == group.table[g][0]
        assert sorted(group.table[g]) == list(n)
        assert group.table[group.inverse(g)][g] == 0
        for h, k in itertools.product(n, n):
            assert group.table[group.table[g][h]][k] == group.table[g][group.table[h][k]]
    for irrep in group.irreps:
        matrices = torch.tensor(irrep.matrices, dtype=torch.float64)
        one = torch.eye(irrep.dim, dtype=torch.float64).expand_as(matrices)
        torch.testing.assert_close(matrices @ matrices.mT, one)
        for g, row in enumerate(group.table):
            torch.testing.assert_close(matrices[g] @ matrices, matrices[list(row)])


@GROUPS
@pytest.mark.parametrize("fixed", [0, 3])
def test_change_of_basis_turns_permutations_into_irreps(group: Group, fixed: int):
    """Acting in the regular basis is permuting copies; in the packed basis it is `Rep.act`."""
    rep = Rep(group, free=5, fixed=fixed)
    packed = torch.randn(2, rep.size, dtype=torch.float64)
    regular = rep.to_regular(packed)
    torch.testing.assert_close(rep.from_regular(regular), packed)
    sizes = [5, fixed] + [5] * (group.order - 1)
    for g in range(group.order):
        first, middle, *rest = regular.split(sizes, -1)
        copies = [first, *rest]
        moved = [copies[group.table[group.inverse(g)][h]] for h in range(group.order)]
        expected = torch.cat([moved[0], middle, *moved[1:]], -1)
        torch.testing.assert_close(rep.to_regular(rep.act(g, packed)), expected)
        if g:
            assert not torch.allclose(rep.act(g, packed), packed)


@pytest.mark.parametrize("group", [FLOP, OCTIC], ids=lambda g: g.name)
def test_image_action_follows_the_table(group: Group):
    image = torch.arange(16.0).reshape(1, 4, 4)
    orbit = [group.act_on_image(g, image) for g in range(group.order)]
    assert len({tuple(x.flatten().tolist()) for x in orbit}) == group.order
    for g, h in itertools.product(range(group.order), repeat=2):
        assert torch.equal(group.act_on_image(g, orbit[h]), orbit[group.table[g][h]])


def test_flop_is_the_pair_of_the_paper():
    r = torch.tensor([3.0, 1.0], dtype=torch.float64)
    packed = FLOP.regular(2).from_regular(r)
    s, a = packed.tolist()
    assert (s, a) == pytest.approx((4 / 2**0.5, 2 / 2**0.5))
    assert FLOP.regular(2).act(1, packed).tolist() == [s, -a]


def test_product_is_the_hadamard_transform_with_factor_half():
    assert FLOP_X_FLOP.change_of_basis.abs().eq(0.5).all()
    flop = FLOP_X_FLOP.elements.index("m,m")
    signs = {irrep.name: irrep.matrices[flop][0][0] for irrep in FLOP_X_FLOP.irreps}
    assert [*signs.items()] == [
        ("sym_sym", 1), ("sym_asym", -1), ("asym_sym", -1), ("asym_asym", 1)
    ]  # fmt: skip


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match="positive multiple of 2"):
        FLOP.regular(7)
    with pytest.raises(ValueError, match="no action on images"):
        FLOP_X_FLOP.act_on_image(1, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="must sum to 2"):
        Group("broken", ("e", "m"), ((0, 1), (1, 0)), FLOP.irreps[:1])
    with pytest.raises(ValueError, match="trivial"):
        Group("broken", ("e",), ((0,),), (Irrep("sign", (((-1.0,),),)),))


@GROUPS
def test_copied_and_pickled_groups_are_the_same(group: Group):
    # they are compared by identity
    rep = group.regular(16)
    assert pickle.loads(pickle.dumps(rep)) == copy.deepcopy(rep) == rep


def test_a_group_of_ones_own_can_be_pickled():
    own = Group(FLOP.name, FLOP.elements, FLOP.table, FLOP.irreps, FLOP.image_action)
    loaded = pickle.loads(pickle.dumps(own))
    assert (loaded.table, loaded.image_action) == (own.table, own.image_action)
    assert loaded is not FLOP
