"""Tests of two models of a cluster file behind one address, on two worker processes."""

from __future__ import annotations

import json
from pathlib import Path

from support.clusters.command_line import command_line, eventually
from support.models.tiny_adapter import build_adapter
from support.several_models.cluster import model_files


def test_models_of_a_cluster_file_answer_by_their_names(tmp_path: Path) -> None:
    files = model_files(tmp_path)
    adapters = [{"name": "poet", "path": str(build_adapter(tmp_path / "poet.gguf", files[1]))}]
    by_hand = [{"worker": "a", "layers": [0, 5]}, {"worker": "b", "layers": [5, 6]}]
    with command_line() as line:
        expected = {}
        with line.cluster(files[0], "a") as cluster:
            expected["a"] = cluster.answer()
        with line.cluster(files[1], "b", adapters=adapters) as cluster:
            expected |= {name: cluster.answer(model=name) for name in ("b", "poet")}
        entries = [
            {"model": str(files[0]), "keep_alive": "10min", "plan": by_hand},
            {"model": str(files[1]), "keep_alive": "10min", "adapters": adapters},
        ]
        with line.cluster("", "both", models=entries) as both:
            assert "other models: b, poet; --served-model NAME chooses a model" in both.command.err.read_text()
            assert "models: a ready, b asleep\n" in line.run("status").out
            assert {name: both.http.get(f"/props?model={name}").json()["is_sleeping"] for name in "ab"} == {
                "a": False,
                "b": True,
            }
            router = both.http.get("/props").json()
            assert (router["role"], router["max_instances"], router["models_autoload"]) == ("router", 2, True)
            assert both.http.get("/cors-proxy?url=http://127.0.0.1").status_code == 403
            assert both.answer() == expected["a"], "the first model, without a name"
            assert both.answer(model="b") == expected["b"] != expected["poet"]
            assert both.answer(model="poet") == expected["poet"]
            assert both.answer(model="a", temperature=0.9, seed=3) != expected["a"]
            states = {model["name"]: model["state"] for model in both.status["models"]}
            assert states == {"a": "ready", "b": "ready"}
            assert [worker["layers"] for worker in both.status["workers"]] == [[0, 5], [5, 6]]
            listed = [(entry["id"], entry["status"]["value"]) for entry in both.http.get("/v1/models").json()["data"]]
            assert listed == [("a", "loaded"), ("b", "loaded"), ("poet", "loaded")]
            assert both.http.get("/v1/models/poet").json()["parent"] == "b"
            written = line.run("generate", "the first word", "-n", "12", "--served-model", "poet", "--json").json
            assert written["token_ids"] == expected["poet"][0]
            unknown = line.run("generate", "a", "--served-model", "c")
            assert unknown.code == 2 and "'c' is not served here, only 'a', 'b', 'poet'" in unknown.error
            assert line.run("why").out.count(": b: ") == 3
            both.command.says("model b: new plan: ")
            both.command.says("model b is awake after")
            both.command.press_ctrl_c()
            done = both.command.wait()
            assert done.code == 0, done.err
            assert done.err.count("measuring worker one: memory bandwidth") <= 2, "with each model"


def test_a_single_one_of_models_sleeps_and_wakes(tmp_path: Path) -> None:
    file = model_files(tmp_path)[0]
    with command_line() as line:
        with line.cluster(file, "a") as cluster:
            expected = cluster.answer()
        with line.cluster("", "a", models=[{"model": str(file), "keep_alive": "100ms"}]) as cluster:
            assert cluster.answer() == expected

            def is_sleeping() -> bool:
                return bool(cluster.http.get("/props").json()["is_sleeping"])

            eventually(is_sleeping, 60, "the model sleeps")
            assert cluster.answer() == expected
            eventually(is_sleeping, 60, "the model sleeps again")


def test_a_plan_of_several_models_names_each(tmp_path: Path) -> None:
    files = model_files(tmp_path)
    path = tmp_path / "both.yaml"
    entries = [{"model": str(files[0]), "name": "one"}, {"model": str(files[1])}]
    path.write_text(json.dumps({"models": entries, "workers": [{"name": "w"}]}))
    with command_line() as line:
        models = line.run("plan", path, "--json").json["models"]
        assert [model["name"] for model in models] == ["one", files[1].stem]
        assert all(model["stages"][0]["worker"] == "w" for model in models)
        entries[1] = {"model": str(files[0]), "name": "other"}
        path.write_text(json.dumps({"models": entries, "workers": [{"name": "w"}]}))
        for command in ("plan", "up"):
            refused = line.run(command, path)
            assert refused.code == 2 and "'one' and 'other' are the same file" in refused.error, command
