"""Two models of a cluster file behind one address, on two worker processes."""

from __future__ import annotations

from pathlib import Path

from support.clusters.command_line import command_line
from support.several_models.cluster import model_files


def test_models_of_a_cluster_file_answer_by_their_names(tmp_path: Path) -> None:
    files = model_files(tmp_path)
    with command_line() as line:
        expected = {}
        for name, file in zip("ab", files, strict=True):
            with line.cluster(file, name) as cluster:
                expected[name] = cluster.answer()
        entries = [{"model": str(file), "keep_alive": "10min"} for file in files]
        with line.cluster("", "both", models=entries) as both:
            assert both.answer() == expected["a"], "the first model, without a name"
            assert both.answer(model="b") == expected["b"]
            assert both.answer(model="a", temperature=0.9, seed=3) != expected["a"]
            states = {model["name"]: model["state"] for model in both.status["models"]}
            assert states == {"a": "ready", "b": "ready"}
            both.command.press_ctrl_c()
            done = both.command.wait()
            assert done.code == 0, done.err
