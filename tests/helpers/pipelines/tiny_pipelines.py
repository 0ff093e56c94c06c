"""Tiny diffusers pipelines with random weights, made from configurations: nothing is fetched, each takes milliseconds.

Every function takes the seed of its weights and answers with a pipeline on the CPU in float32. All are silent and
without a safety checker; `pipe(prompt="...")` and `pipe.save_pretrained(folder)` work for those with a CLIP encoder.
"""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers

WIDTH = 32  # of text embeddings
SIZE = 16  # pixels of an image with one down-sampling autoencoder: 8 latent pixels
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CHANNELS = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}

diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


def quiet(pipe: Any) -> Any:
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- components ------------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """A CLIP tokenizer whose only tokens are lower-case letters, digits and the two specials."""
    letters = string.ascii_lowercase + string.digits + ",."
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_config(**changes: Any) -> Any:
    words = len(tokenizer())
    settings = {
        "vocab_size": words,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
        "projection_dim": WIDTH,
    }
    return transformers.CLIPTextConfig(**(settings | changes))


def text_encoder() -> Any:
    return transformers.CLIPTextModel(text_config()).eval()


def projected_text_encoder() -> Any:
    return transformers.CLIPTextModelWithProjection(text_config(hidden_act="gelu")).eval()


def autoencoder(channels: int = 4, **settings: Any) -> Any:
    """Down-samples by 2."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        **settings,
    ).eval()


def conditional_unet(in_channels: int = 4, **settings: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=in_channels,
        out_channels=4,
        attention_head_dim=2,
        **({"cross_attention_dim": WIDTH} | CHANNELS | BLOCKS | settings),
    ).eval()


def _stable_diffusion_parts(in_channels: int) -> dict[str, Any]:
    return {
        "unet": conditional_unet(in_channels),
        "vae": autoencoder(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": diffusers.DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


# --- pixels ----------------------------------------------------------------------------------------------------------


def unet2d(pipeline: Any = None, *, seed: int = 0) -> Any:
    """DDIMPipeline (or another class, such as DDPMPipeline) of an unconditional UNet2DModel, images of 8 x 8."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        **CHANNELS,
    ).eval()
    pipeline = pipeline or diffusers.DDIMPipeline
    return quiet(pipeline(unet=unet, scheduler=diffusers.DDPMScheduler(clip_sample=False)))


# --- latent diffusion ------------------------------------------------------------------------------------------------


def stable_diffusion(pipeline: Any = None, *, in_channels: int = 4, seed: int = 0) -> Any:
    """StableDiffusionPipeline, or its image-to-image or inpainting sister (`in_channels` 4 or 9)."""
    torch.manual_seed(seed)
    pipeline = pipeline or diffusers.StableDiffusionPipeline
    return quiet(pipeline(**_stable_diffusion_parts(in_channels)))


def controlnet(*, seed: int = 0) -> Any:
    """StableDiffusionControlNetPipeline; `image` is the control."""
    torch.manual_seed(seed)
    parts = _stable_diffusion_parts(4)
    net = diffusers.ControlNetModel(
        in_channels=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(2, 4),
        down_block_types=BLOCKS["down_block_types"],
        **CHANNELS,
    ).eval()
    for parameter in net.parameters():  # its last layers start at zero, where it would control nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return quiet(diffusers.StableDiffusionControlNetPipeline(controlnet=net, **parts))


def sdxl(pipeline: Any = None, *, seed: int = 0) -> Any:
    """StableDiffusionXLPipeline, or its image-to-image or inpainting sister."""
    torch.manual_seed(seed)
    unet = conditional_unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    parts = {
        "unet": unet,
        "vae": autoencoder(),
        "text_encoder": text_encoder(),
        "text_encoder_2": projected_text_encoder(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    }
    pipeline = pipeline or diffusers.StableDiffusionXLPipeline
    return quiet(pipeline(**parts, add_watermarker=False))


def animatediff(*, seed: int = 0) -> Any:
    """AnimateDiffPipeline, a video pipeline with prompts; ask for `num_frames=4` or fewer."""
    torch.manual_seed(seed)
    parts = _stable_diffusion_parts(4)
    adapter = diffusers.MotionAdapter(
        block_out_channels=CHANNELS["block_out_channels"],
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
    ).eval()
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return quiet(diffusers.AnimateDiffPipeline(motion_adapter=adapter, **{name: parts[name] for name in names}))


# --- flow matching: prompts are given as embeddings, by `embeddings(pipe)` --------------------------------------------


def sd3(pipeline: Any = None, *, seed: int = 0) -> Any:
    """StableDiffusion3Pipeline, or its image-to-image sister, with prompt embeddings."""
    torch.manual_seed(seed)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
    ).eval()
    pipeline = pipeline or diffusers.StableDiffusion3Pipeline
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(pipeline(transformer=transformer, scheduler=flow, vae=vae, **_no_encoders(3)))


def flux(pipeline: Any = None, *, seed: int = 0) -> Any:
    """FluxPipeline, or its image-to-image sister, with prompt embeddings; its schedule shifts with the image size."""
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    pipeline = pipeline or diffusers.FluxPipeline
    vae = autoencoder(1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return quiet(pipeline(transformer=transformer, scheduler=flow, vae=vae, **_no_encoders(2)))


def wan(*, seed: int = 0) -> Any:
    """WanPipeline, a video pipeline of a flow model with UniPC, with prompt embeddings; latents only."""
    torch.manual_seed(seed)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    encoder = {"tokenizer": None, "text_encoder": None}
    return quiet(diffusers.WanPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **encoder))


def embeddings(pipe: Any, *, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments that stand for a prompt (and a negative one) of an sd3, flux or wan pipeline."""
    generator = torch.Generator().manual_seed(seed)
    names = {"prompt_embeds": (1, 5, WIDTH), "pooled_prompt_embeds": (1, WIDTH)}
    if type(pipe).__name__.startswith("Wan"):
        names.pop("pooled_prompt_embeds")
    if not type(pipe).__name__.startswith("Flux"):
        names |= {f"negative_{name}": shape for name, shape in names.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def _no_encoders(count: int) -> dict[str, None]:
    endings = ["", *(f"_{i}" for i in range(2, count + 1))]
    return {name + ending: None for name in ("text_encoder", "tokenizer") for ending in endings}
