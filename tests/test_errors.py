import pytest

from deit.errors import EXIT_USER_ERROR, UserError, one_line_errors, suggest


def test_user_error_is_one_line_and_status_2(capsys):
    def body():
        raise UserError("no folder 'x'\n  give --data-path")

    assert one_line_errors(body) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.err == "error: no folder 'x' give --data-path\n"
    assert captured.out == ""


def test_status_of_the_body_is_kept():
    assert one_line_errors(lambda: None) == 0
    assert one_line_errors(lambda: 3) == 3


def test_defects_keep_their_traceback():
    def body():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        one_line_errors(body)


def test_suggestions():
    known = ["d2_deit_small_patch16_LS", "d2_deit_base_patch16_LS", "resmlp_12"]
    assert "d2_deit_small_patch16_LS" in suggest("d2_deit_smal_patch16", known)
    assert suggest("zzz", known) == ""
    assert suggest("resmlp_1", ["resmlp_12"]) == "; did you mean resmlp_12?"
