"""What a user may hand over as a mesh, and the steps on every mesh that is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from typer.testing import CliRunner

import pdx
from pdx.cli import app
from pdx.errors import RequestError
from pdx.installation.devices import device_name, where_run
from pdx.meshes import as_mesh, make_mesh, no_ambient_mesh
from pdx.model import param_specs
from pdx.sharding import place
from tests.support import tiny_model
from tests.support.models import LLAMA, close, params, tokens

pytestmark = [pytest.mark.thin(8), pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")]
B = 4


def devices(*shape):
    return np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)


def explicit(*shape, names=("data", "model")):
    """As `jax.make_mesh` makes one by default."""
    return Mesh(devices(*shape), names, axis_types=(AxisType.Explicit,) * len(names))


# What is handed over -> the sizes of data and model, and the order of the devices.
TAKEN = {
    "explicit axes": (lambda: explicit(2, 4), (2, 4), range(8)),
    "a text with spaces": (lambda: " data = 2 , model = 2 ", (2, 2), range(4)),
    "sizes": (lambda: {"model": 4, "data": 2}, (2, 4), range(8)),
    "sizes of numpy": (lambda: {"model": np.int64(4)}, (1, 4), range(4)),
    "no size": (lambda: {}, (1, 1), range(1)),
    "model alone": (lambda: Mesh(devices(2), ("model",)), (1, 2), range(2)),
    "data alone": (lambda: explicit(2, names=("data",)), (2, 1), range(2)),
    "the other order": (lambda: Mesh(devices(4, 2), ("model", "data")), (2, 4), (0, 2, 4, 6, 1, 3, 5, 7)),
    "an axis of one device": (lambda: Mesh(devices(2, 1, 2), ("data", "expert", "model")), (2, 2), range(4)),
    "devices in another order": (
        lambda: Mesh(devices(8)[::-1].reshape(2, 4), ("data", "model")),
        (2, 4),
        range(7, -1, -1),
    ),
    "some of the devices": (lambda: Mesh(devices(8)[3:7].reshape(2, 2), ("data", "model")), (2, 2), range(3, 7)),
    "one device": (lambda: explicit(1, 1), (1, 1), range(1)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_becomes_a_mesh_of_data_and_model(name):
    given, shape, order = TAKEN[name]
    mesh = as_mesh(given())
    assert (mesh.axis_names, mesh.devices.shape) == (("data", "model"), shape)
    assert [d.id for d in mesh.devices.flat] == list(order)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert as_mesh(mesh) == mesh


REFUSED = {
    "other names": (lambda: Mesh(devices(2, 4), ("x", "y")), "has the axis 'x', which pdx does not know: name"),
    "one other name": (lambda: Mesh(devices(2, 4), ("data", "tensor")), "has the axis 'tensor'"),
    "no devices": (lambda: AbstractMesh((2, 4), ("data", "model")), "has no devices: give a mesh over devices"),
    "a device twice": (lambda: Mesh(np.array([jax.devices()[0]] * 2), ("model",)), "names a device twice"),
    "an empty mesh": (lambda: Mesh(np.empty((0,), object), ("model",)), "is empty"),
    "unknown sizes": (lambda: {"tensor": 2}, "expected axes out of data, model with a size each"),
    "a size of zero": (lambda: {"model": 0}, "expected axes"),
    "half a device": (lambda: {"model": 2.5}, "expected axes"),
    "yes": (lambda: {"model": True}, "expected axes"),
    "a text with a dot": (lambda: "model=2.0", "expected axes"),
    "an axis twice": (lambda: "model=2,model=2", "expected axes"),
    "another digit": (lambda: "model=²", "expected axes"),
    "too many": (lambda: {"data": 3, "model": 3}, "needs 9 devices, there are 8"),
    "a number": (lambda: 8, "mesh 8 of type int is no mesh: expected axes"),
    "devices": (lambda: jax.devices()[:1], "of type list is no mesh"),
    "a sharding": (lambda: NamedSharding(make_mesh(), PartitionSpec()), "of type NamedSharding is no mesh"),
}


@pytest.mark.parametrize("enters", ["load", "init_cache", "init_paged_cache", "Model", "place"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_wherever_a_mesh_enters(name, enters):
    given, says = REFUSED[name]
    into = {
        "load": lambda mesh: pdx.load("no such model", mesh=mesh),  # before the model is looked for
        "init_cache": lambda mesh: pdx.init_cache(LLAMA, 2, 128, mesh=mesh),
        "init_paged_cache": lambda mesh: pdx.init_paged_cache(LLAMA, 2, mesh=mesh),
        "Model": lambda mesh: pdx.Model({}, LLAMA, "", None, jnp.float32, mesh),
        "place": lambda mesh: place({}, {}, mesh),
    }[enters]
    mesh = given()
    with pytest.raises(RequestError, match=says) as error:
        into(mesh)
    assert "\n" not in str(error.value)


def answer(mesh):
    """Logits of a prefill and a decode step."""
    weights = params(LLAMA) if mesh is None else place(params(LLAMA), param_specs(LLAMA), mesh)
    cache = pdx.init_cache(LLAMA, B, 128, mesh=mesh)
    logits, cache = pdx.prefill(weights, LLAMA, tokens(LLAMA, B, 8), np.array([8, 3, 2, 1]), cache)
    cache = cache.truncate(np.array([7, 3, 2, 1]))
    out = pdx.decode_many(
        weights,
        LLAMA,
        np.asarray(logits).argmax(-1).astype(np.int32),
        cache,
        pdx.SamplingState.create([pdx.SamplingOptions()] * B, LLAMA.vocab_size),
        2,
    )
    logits, _ = pdx.decode_step(weights, LLAMA, np.asarray(out.last), np.ones(B, bool), out.cache)
    return np.asarray(logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["explicit axes", "data alone", "the other order", "devices in another order"])
def test_the_steps_answer_on_it_as_on_one_device(name):
    close(answer(TAKEN[name][0]()), answer(None))


AMBIENT = {
    "another, automatic": lambda: Mesh(devices(4, 2), ("data", "model")),
    "another, explicit": lambda: explicit(8, names=("x",)),
    "the same, explicit": lambda: explicit(2, 2),
    "other devices": lambda: Mesh(devices(8)[4:], ("model",)),
}


@pytest.mark.parametrize("sizes", ["data=2,model=2", None])
@pytest.mark.parametrize("name", AMBIENT)
def test_a_mesh_that_is_set_around_a_call_changes_nothing(name, sizes, count_compiles):
    mesh = as_mesh(sizes)
    expected = answer(mesh)
    with jax.set_mesh(AMBIENT[name]()):
        close(answer(mesh), expected)  # JAX 0.10 compiles once more where any mesh was set before
    with jax.set_mesh(AMBIENT[name]()), count_compiles() as compiles:
        close(answer(mesh), expected)
        assert not jax.sharding.get_abstract_mesh().empty  # it is the caller's again
    assert compiles() == 0


@pytest.mark.slow
def test_a_set_mesh_changes_nothing_for_loading_generating_and_the_engine(tmp_path):
    directory = tiny_model.make(tmp_path)
    expected = pdx.generate(pdx.load(directory), "Hello", max_tokens=6, ignore_eos=True)[0].token_ids
    with jax.set_mesh(explicit(8, names=("x",))):
        model = pdx.load(directory, mesh={"model": 2})
        pieces = []
        for piece in pdx.stream(model, "Hello", max_tokens=6, ignore_eos=True):
            assert not jax.sharding.get_abstract_mesh().empty  # between two pieces too
            pieces.append(piece)
        with pdx.Engine(model, pdx.EngineConfig(slots=2, pages=8, max_context=64, token_budget=32)) as engine:
            served = engine.generate(["Hello"], max_tokens=6, ignore_eos=True)[0]
            assert engine.metrics().compiles == 0
    assert pieces[-1].completion.token_ids == served.token_ids == expected


def test_under_a_trace_a_set_mesh_stays():
    with jax.set_mesh(make_mesh("data=2")):

        def inside(x):
            with no_ambient_mesh():
                return x + 1

        assert jax.jit(inside)(1) == 2


@pytest.mark.parametrize(
    ("cache_mesh", "says"),
    [
        (None, "the cache on one device"),
        ("data=4", r"the cache on \{'data': 4, 'model': 1\}"),
        (Mesh(np.array(jax.devices()[3::-1]).reshape(2, 2), ("data", "model")), "in another order"),
    ],
)
def test_a_cache_of_another_mesh_than_the_parameters_is_refused(cache_mesh, says):
    weights = place(params(LLAMA), param_specs(LLAMA), "data=2,model=2")
    cache = pdx.init_cache(LLAMA, B, 128, mesh=cache_mesh)
    with pytest.raises(RequestError, match=f"the parameters lie on a mesh of .*{says}.*give both the same mesh"):
        pdx.decode_step(weights, LLAMA, np.zeros(B, np.int32), np.ones(B, bool), cache)


@pytest.mark.parametrize("command", [["chat"], ["bench", "load", "--rate", "1"], ["generate", "hello"]])
def test_commands_that_run_a_model_take_a_mesh(command):
    done = CliRunner().invoke(app, [*command, "--mesh", "rows=2"])
    assert isinstance(done.exception, RequestError)
    assert "expected axes out of data, model" in str(done.exception)


def test_the_device_line_tells_the_mesh():
    assert device_name(mesh=make_mesh("data=2,model=4")) == "cpu x8 (data=2, model=4)"
    assert device_name(mesh=make_mesh()) == "cpu (data=1, model=1)"
    assert device_name() == "cpu x8"


def test_the_device_line_of_a_model_without_a_mesh_tells_one_device():
    assert where_run(None) == "cpu"
    assert where_run(make_mesh("model=2")) == "cpu x2 (data=1, model=2)"
