import pytest

from deit.errors import EXIT_USER_ERROR, UserError, one_line_errors, suggest


def test_user_errors_are_one_line_and_defects_keep_their_traceback(capsys):
    def fail(error):
        raise error

    mistake = UserError("no folder 'x'\n  give --data-path")
    assert one_line_errors(lambda: fail(mistake)) == EXIT_USER_ERROR
    assert capsys.readouterr() == ("", "error: no folder 'x' give --data-path\n")
    assert [one_line_errors(lambda: None), one_line_errors(lambda: 3)] == [0, 3]
    with pytest.raises(ValueError, match="a defect"):
        one_line_errors(lambda: fail(ValueError("a defect")))


def test_suggestions():
    known = ["d2_deit_small_patch16_LS", "d2_deit_base_patch16_LS", "resmlp_12"]
    assert "d2_deit_small_patch16_LS" in suggest("d2_deit_smal_patch16", known)
    assert suggest("zzz", known) == ""
    assert suggest("resmlp_1", ["resmlp_12"]) == "; did you mean resmlp_12?"
