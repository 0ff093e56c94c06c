"""A pipeline as a network: its answers are those of its own loop, and it is left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny_pipelines  # noqa: E402
from PIL import Image  # noqa: E402

from olss_fast.adapters.diffusers.pipeline_calls import check_calls, guidance_scales_of  # noqa: E402
from olss_fast.adapters.diffusers.pipeline_network import open_pipeline  # noqa: E402
from olss_fast.errors import InputError, NetworkError  # noqa: E402
from olss_fast.support.identity import identity  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 10


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipelines.stable_diffusion()


def ask(network: Any, x: Any, timestep: float) -> Any:
    count = x.shape[0]
    return network(x, torch.full((count,), timestep), sample=torch.arange(count))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def by_hand(pipe: Any, prompt: str, x: Any, timestep: float, guidance_scale: float) -> Any:
    """u + g (c - u) from the UNet itself."""
    with torch.no_grad():
        given, without = pipe.encode_prompt(prompt, "cpu", 1, True)
        c = pipe.unet(x, torch.tensor(timestep), encoder_hidden_states=given).sample
        u = pipe.unet(x, torch.tensor(timestep), encoder_hidden_states=without).sample
    return u + guidance_scale * (c - u)


def test_answers_are_the_network_with_its_own_prompt_and_guidance(pipe: Any) -> None:
    # Calls take turns on one pipeline object, which holds the guidance scale of the call that ran last.
    calls = [{"prompt": "a", "guidance_scale": 3.0}, {"prompt": "b c", "guidance_scale": 7.5}]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with open_pipeline(pipe, calls, teacher_steps=STEPS) as network:
        for timestep in (999.0, 437.5, 0.0, 999.0):
            answer = ask(network, x, timestep)
            for i, call in enumerate(calls):
                expected = by_hand(pipe, call["prompt"], x[i : i + 1], timestep, call["guidance_scale"])
                torch.testing.assert_close(answer[i : i + 1], expected, rtol=1e-4, atol=1e-5)  # another batch size


def test_a_call_of_several_images_is_so_many_samples(pipe: Any) -> None:
    calls = [{"prompt": ["a", "b"], "guidance_scale": 4.0}, {"prompt": "c", "guidance_scale": 4.0}]
    with open_pipeline(pipe, calls, teacher_steps=STEPS) as network:
        assert network.start.shape == (3, 4, 8, 8)
        x = torch.randn(2, 4, 8, 8)
        answer = network(x, torch.full((2,), 300.0), sample=torch.tensor([1, 2]))
    for row, prompt in enumerate("bc"):
        expected = by_hand(pipe, prompt, x[row : row + 1], 300.0, 4.0)
        torch.testing.assert_close(answer[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_generators_of_one_call_may_come_as_a_tuple(pipe: Any) -> None:
    starts = []
    for kind in (list, tuple):
        generators = kind(torch.Generator().manual_seed(i) for i in range(2))
        with open_pipeline(pipe, [{"prompt": ["a", "b"], "generator": generators}], teacher_steps=STEPS) as network:
            starts.append(network.start)
    assert torch.equal(*starts)


def test_the_first_question_is_answered_from_the_opening(pipe: Any) -> None:
    with open_pipeline(pipe, [{"prompt": "a"}], teacher_steps=STEPS) as network:
        before = network.evaluations
        ask(network, network.start, 999.0)
        assert network.evaluations == before
        ask(network, network.start, 998.0)
        assert network.evaluations == before + 1


def test_more_questions_than_timesteps(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olss_fast.adapters.diffusers.pipeline_slot.QUESTIONS", 4)
    x = torch.randn(1, 4, 8, 8)
    with open_pipeline(pipe, [{"prompt": "a", "guidance_scale": 2.0}], teacher_steps=4) as network:
        answers = [ask(network, x, 500.0) for _ in range(12)]
    assert all(torch.equal(each, answers[0]) for each in answers)


@pytest.mark.parametrize("where", ["network", "call", "interrupt"])
def test_the_pipeline_is_left_as_it_was(pipe: Any, where: str) -> None:
    before = dict(vars(pipe))
    generator = torch.Generator().manual_seed(5)
    state, random_state = generator.get_state(), torch.random.get_rng_state()
    calls = [{"prompt": "a", "generator": generator}, {"prompt": "b"}]
    if where == "call":
        with pytest.raises(InputError, match=r"calls\[1\] of StableDiffusionPipeline failed: ValueError"):  # noqa: SIM117
            with open_pipeline(pipe, [calls[0], {"prompt": 5}], teacher_steps=STEPS):
                pass
    else:
        error = KeyboardInterrupt if where == "interrupt" else RuntimeError
        with pytest.raises(error), open_pipeline(pipe, calls, teacher_steps=STEPS) as network:  # noqa: PT012
            hook = pipe.unet.register_forward_hook(lambda *_: (_ for _ in ()).throw(error("stop")))
            try:
                ask(network, network.start, 500.0)
            finally:
                hook.remove()
    assert list(vars(pipe).items()) == list(before.items())
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert pipe("a", num_inference_steps=2, output_type="latent").images.shape == (1, 4, 8, 8)


def test_image_to_image_begins_where_its_strength_says(pipe: Any) -> None:
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    call = {"prompt": "a", "image": picture(), "strength": 0.6, "generator": torch.Generator().manual_seed(0)}
    with open_pipeline(image_to_image, [call], teacher_steps=STEPS) as network:
        assert network.begin == 4
        assert network.first_time == network.full_schedule.timesteps(STEPS, "trailing")[4] == network.schedule.first
        # x = alpha x0 + sigma eps: the same image and noise as the original scheduler's own
        scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        seen: list[Any] = []
        scheduler.set_timesteps(STEPS)
        add_noise = scheduler.add_noise
        scheduler.add_noise = lambda x, eps, t: seen.append((x, eps)) or add_noise(x, eps, t)
        other = diffusers.StableDiffusionImg2ImgPipeline(
            **{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False
        )
        other(**{**call, "generator": torch.Generator().manual_seed(0)}, num_inference_steps=STEPS)
        clean, noise = seen[0]
        alpha, sigma, _ = network.full_schedule.levels(network.first_time)
        torch.testing.assert_close(network.start, float(alpha) * clean + float(sigma) * noise, rtol=1e-5, atol=1e-5)


def test_replaced_pixels_are_nobodys(pipe: Any) -> None:
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    mask = Image.fromarray(np.kron([[0, 255], [0, 0]], np.ones((8, 8))).astype(np.uint8))
    call = {"prompt": "a", "image": picture(), "mask_image": mask, "height": 16, "width": 16, "strength": 1.0}
    with open_pipeline(inpaint, [call, {**call, "prompt": "b"}], teacher_steps=STEPS) as network:
        answer = ask(network, torch.randn(2, 4, 8, 8), 500.0)
        for each in (network.start, answer):
            outside = each.clone()
            outside[:, :, :4, 4:] = 0.0
            assert not outside.any()
            assert each[:, :, :4, 4:].all()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "controlnet", "animatediff", "unet2d"])
def test_every_kind_of_pipeline_can_be_asked(name: str) -> None:
    pipe = getattr(tiny_pipelines, name)()
    call: dict[str, Any] = {"sd3": {}, "flux": {"height": 16, "width": 16}, "unet2d": {}}.get(name, {"prompt": "a"})
    if name in ("sd3", "flux"):
        call |= tiny_pipelines.embeddings(pipe)
    if name == "controlnet":
        call["image"] = picture()
    if name == "animatediff":
        call |= {"num_frames": 4}
    with open_pipeline(pipe, [call, call], teacher_steps=STEPS) as network:
        x = torch.randn(network.start.shape)
        first, again = ask(network, x, 300.0), ask(network, x, 300.0)
        other = ask(network, x, 600.0)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3)
    assert network.schedule.prediction_type == ("flow" if name in ("sd3", "flux") else "epsilon")


def test_two_sizes_cannot_share_a_plan(pipe: Any) -> None:
    calls = [{"prompt": "a"}, {"prompt": "a", "height": 32, "width": 16}]
    with pytest.raises(InputError, match=r"calls\[1\] has latents.*\(4, 16, 8\).*one plan is for one size"):  # noqa: SIM117
        with open_pipeline(pipe, calls, teacher_steps=STEPS):
            pass


def test_guidance_that_changes_with_the_step_is_noticed(pipe: Any) -> None:
    count = 0

    def louder(module: Any, arguments: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        return (output[0] * count,)

    hook = pipe.unet.register_forward_hook(louder)
    try:
        with pytest.raises(NetworkError, match="answers the same question otherwise at its second step"):  # noqa: SIM117
            with open_pipeline(pipe, [{"prompt": "a"}], teacher_steps=STEPS):
                pass
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "expected a list of keyword dictionaries"),
        ({"prompt": "a"}, "expected a list of keyword dictionaries"),
        (["a"], r"calls\[0\] is 'a'"),
        (
            [{"prompt": "a", "callback_on_step_end": print}],
            r"calls\[0\] has callback_on_step_end=.*the steps of a run differ",
        ),
        ([{"prompt": "a"}, {"promt": "a"}], r"calls\[1\] has 'promt', which StableDiffusionPipeline does not take"),
    ],
)
def test_unusable_calls(pipe: Any, calls: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_calls(pipe, calls)


@pytest.mark.parametrize("argument", ["num_inference_steps", "timesteps", "sigmas"])
def test_steps_are_not_the_callers_to_choose(pipe: Any, argument: str) -> None:
    with pytest.raises(InputError, match=rf"calls\[0\] has {argument}=.*leave it out"):  # noqa: SIM117
        with open_pipeline(pipe, [{"prompt": "a", argument: 5}], teacher_steps=STEPS):
            pass


def test_a_controlnet_for_some_of_the_steps_is_refused() -> None:
    pipe = tiny_pipelines.controlnet()
    check_calls(pipe, [{"prompt": "a", "control_guidance_end": 1.0}])
    with pytest.raises(InputError, match=r"calls\[0\] has control_guidance_end=0.5"):
        check_calls(pipe, [{"prompt": "a", "control_guidance_end": 0.5}])


def test_no_pipeline() -> None:
    with pytest.raises(InputError, match="list is no pipeline with a scheduler"):
        check_calls([], [{}])


def test_the_identity_sees_everything_in_a_call() -> None:
    base = {"prompt": "a", "image": picture(), "generator": torch.Generator().manual_seed(0), "ip": torch.zeros(2)}
    others = [
        {"prompt": "b"},
        {"image": picture(1)},
        {"generator": torch.Generator().manual_seed(1)},
        {"ip": torch.ones(2)},
        {"guidance_scale": 7.5},
    ]
    identities = {str(identity({**base, **other}).digests) for other in others} | {str(identity(base).digests)}
    assert len(identities) == 1 + len(others)
    assert identity({**base, "image": picture()}).digests == identity(base).digests


def test_guidance_scales(pipe: Any) -> None:
    assert guidance_scales_of(pipe, [{"guidance_scale": 9}, {}]) == (7.5, 9.0)  # the pipeline's own default is 7.5
    assert guidance_scales_of(tiny_pipelines.unet2d(), [{}]) == ()
