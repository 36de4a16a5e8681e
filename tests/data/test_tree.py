"""What counts as an image of a class, in folders and in archives alike."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from image_files import contents, pack

from deit.data import build_dataset
from deit.errors import UserError


def litter(folder: Path) -> None:
    """What operating systems and tools leave among the images of one split."""
    image = (folder / "ant" / "ant_0.JPEG").read_bytes()
    for name in ("ant/._ant_0.JPEG", "ant/.ipynb_checkpoints/ant_0-checkpoint.JPEG", ".x/a/0.png",
                 "__MACOSX/ant/0.png", "bee/@eaDir/bee_0.JPEG/THUMB_M.jpg", "ant/.DS_Store",
                 "ant/moving.gif", "ant/notes.TXT", "bee/plain", "stray.png"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)


LEFT_OUT = (
    "not read in {}: hidden files: 6, .gif: 1, .txt: 1, images outside the class folders: 1, "
    "no suffix: 1"
)


class TestWhatIsNoImage:
    @pytest.mark.parametrize("prefix", [None, "", "val/", "./val/", "data/val/"])
    def test_in_folders_and_archives(self, own_image_tree, image_tree, tmp_path, prefix):
        """With a prefix in an archive."""
        where, root = own_image_tree / "val", own_image_tree
        litter(where)
        if prefix is not None:
            folder, where, root = where, tmp_path / "val.zip", tmp_path
            with zipfile.ZipFile(where, "w") as opened:
                for path in folder.rglob("*"):
                    opened.write(path, f"{prefix}{path.relative_to(folder)}")
        dataset = build_dataset("val", root=root, zip_archive=prefix is not None)
        clean = build_dataset("val", root=image_tree)
        assert dataset.class_names == clean.class_names == ("ant", "bee", "cat")
        assert contents(dataset) == contents(clean)
        assert (dataset.note, clean.note) == (LEFT_OUT.format(where), "")

    def test_a_hidden_archive_and_another_split_are_not_in_the_way(self, image_tree, tmp_path):
        pack(image_tree, tmp_path / "all.zip", prefix="imagenet/")
        with zipfile.ZipFile(tmp_path / "all.zip", "a") as opened:
            opened.write(image_tree / "val" / "ant" / "ant_0.JPEG", "__MACOSX/val/dog/0.JPEG")
        (tmp_path / "._all.zip").touch()
        dataset = build_dataset("val", root=tmp_path, zip_archive=True)
        note = f"not read in {tmp_path / 'all.zip'}: hidden files: 1"
        assert (len(dataset), dataset.note) == (12, note)

    def test_a_class_of_which_nothing_is_read(self, own_image_tree, tmp_path):
        (own_image_tree / "val" / "wasp").mkdir()
        (own_image_tree / "val" / "wasp" / "wasp.gif").touch()
        expected = r"no images in the class folders wasp of .*; not read in .*\.gif: 1\b"
        with pytest.raises(UserError, match=expected):
            build_dataset("val", root=own_image_tree)
        pack(own_image_tree / "val", tmp_path / "val.zip")
        with pytest.raises(UserError, match=expected):
            build_dataset("val", root=tmp_path, zip_archive=True)

    def test_a_file_that_was_added_twice_to_an_archive(self, image_tree, tmp_path):
        pack(image_tree / "val", tmp_path / "val.zip")
        with (
            pytest.warns(UserWarning, match="Duplicate"),
            zipfile.ZipFile(tmp_path / "val.zip", "a") as opened,
        ):
            opened.write(image_tree / "val" / "bee" / "bee_1.JPEG", "ant/ant_0.JPEG")
        dataset = build_dataset("val", root=tmp_path, zip_archive=True)
        assert len(dataset) == 12
        assert dataset[0][0].tobytes() == dataset[5][0].tobytes()


class TestLinks:
    @pytest.mark.parametrize("target", [".", "..", "../bee", "../cat/deeper", "../../val"])
    def test_what_is_read_already_is_not_read_again(self, own_image_tree, image_tree, target):
        (own_image_tree / "val" / "ant" / "again").symlink_to(target)
        dataset = build_dataset("val", root=own_image_tree)
        assert contents(dataset) == contents(build_dataset("val", root=image_tree))
        repeated = "links to folders that are read already: 1"
        assert dataset.note == f"not read in {own_image_tree / 'val'}: {repeated}"

    def test_folders_elsewhere_are_followed_once(self, own_image_tree, image_tree):
        val = own_image_tree / "val"
        (val / ".hidden").mkdir()
        (val / "bee").rename(val / ".hidden" / "bee")  # a class
        (val / "ant" / "deeper").rename(own_image_tree / "part")  # of a class
        (val / "bee").symlink_to(".hidden/bee")
        (val / "ant" / "deeper").symlink_to("../../part")
        (val / "ant" / "deeper2").symlink_to("../../part")
        (val / "cat" / "broken").symlink_to("nowhere")
        (val / "cat" / "itself").symlink_to("itself")
        (val / ".all").symlink_to("/")  # hidden: not followed
        dataset = build_dataset("val", root=own_image_tree)
        assert contents(dataset) == contents(build_dataset("val", root=image_tree))
        assert "folders that are read already: 1" in dataset.note
        assert "hidden files: 2, no suffix: 2" in dataset.note

    def test_two_classes_cannot_be_one_folder(self, own_image_tree):
        (own_image_tree / "val" / "wasp").symlink_to("bee")
        with pytest.raises(UserError, match=r"class folders wasp .* read already: 1"):
            build_dataset("val", root=own_image_tree)

    def test_a_folder_that_may_not_be_read(self, own_image_tree, monkeypatch):
        def refuse(path):
            if str(path).endswith("deeper"):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        scandir = os.scandir
        monkeypatch.setattr("deit.data.tree.os.scandir", refuse)
        with pytest.raises(UserError, match=r"cannot read the folder .*deeper: .*denied"):
            build_dataset("val", root=own_image_tree)
