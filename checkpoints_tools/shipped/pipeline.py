"""Images of classes by a SiT (flow matching, Euler's method) or a DiT (ancestral sampling) and its VAE, with guidance."""

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class SiTPipeline(DiffusionPipeline):
    """Pipeline of a SiT or a DiT; the numbers are the defaults of a call."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        guidance_channels: int | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            guidance_channels=guidance_channels,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Makes one image for each class; numbers that are left out are the pipeline's own.

        Args:
          class_labels: 0 to transformer.config.num_embeds_ada_norm - 1.
          num_inference_steps: how many steps to take.
          guidance_scale: 1 is no guidance.
          guidance_low, guidance_high: guidance is for steps that start at guidance_low <= t <= guidance_high, 1 is noise.
          guidance_channels: guide so many channels of the latents, the first ones; default all.
          latents: noise [B, C, h, w] to start from; drawn with the generator otherwise.
          output_type: 'pil', 'np' or 'pt' in [0, 1], or 'latent', before they are decoded.
        """
        device, config = self._execution_device, self.transformer.config
        labels = self._labels(class_labels).to(device)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is unknown; allowed: 'pil', 'np', 'pt', 'latent'")
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        scale = self._setting("guidance_scale", guidance_scale)
        low, high = self._setting("guidance_low", guidance_low), self._setting("guidance_high", guidance_high)
        channels = self._setting("guidance_channels", guidance_channels) or config.in_channels
        times = self._set_times(self._setting("num_inference_steps", num_inference_steps), device)
        steps = list(zip(times, self.scheduler.timesteps))
        for time, timestep in self.progress_bar(steps):
            guided = scale > 1 and low * times[0] <= time <= high * times[0]
            output = self._predict(latents, time, labels, scale if guided else 1, channels)
            latents = self.scheduler.step(output, timestep, latents, generator=generator).prev_sample
        images = latents if output_type == "latent" else self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _setting(self, name, given):
        return self.config[name] if given is None else given

    def _labels(self, given):
        """Returns classes as a tensor; ValueError for others, which would end the process on a GPU."""
        labels, classes = torch.as_tensor(given).reshape(-1), self.transformer.config.num_embeds_ada_norm
        if not len(labels) or labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels {given}: allowed: a list of whole numbers from 0 to {classes - 1}")
        return labels

    def _set_times(self, steps, device):
        """Tells the scheduler the steps; returns the times at which they start, as the transformer knows them."""
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            times, shift = np.linspace(1, 0, steps + 1)[:-1], self.scheduler.shift
            self.scheduler.set_timesteps(sigmas=times.tolist(), device=device)
            return (shift * times / (1 + (shift - 1) * times)).tolist()  # as the scheduler shifts them
        if isinstance(self.scheduler, DDPMScheduler):  # whose own spacing rounds some halves otherwise than the published one
            last, intervals = self.scheduler.config.num_train_timesteps - 1, max(steps - 1, 1)
            times = np.rint(np.cumsum([0.0] + [last / intervals] * intervals)).astype(int)
            self.scheduler.set_timesteps(timesteps=times[::-1].tolist(), device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.timesteps.tolist()

    def _predict(self, latents, time, labels, scale, channels):
        """Returns the transformer's output in float32, guided if the scale is not 1."""
        if scale != 1:
            latents = torch.cat([latents, latents])
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)])
        times = torch.full((len(latents),), time, device=latents.device)
        output = self.transformer(latents.to(self.transformer.dtype), times, labels).sample.float()
        if scale != 1:
            conditional, unconditional = output.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            output = torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):  # a velocity; sigma's channels are unused
            output = output[:, : self.transformer.config.in_channels]
        return output

    def _to_images(self, latents, output_type):
        config, channels = self.vae.config, latents.shape[1]
        mean = config.latents_mean or [config.shift_factor or 0.0] * channels
        std = config.latents_std or [1.0] * channels
        mean, std = (torch.tensor(values, device=latents.device).reshape(1, -1, 1, 1) for values in (mean, std))
        scaling = 1.0 if config.latents_std else config.scaling_factor
        images = self.vae.decode((latents * std / scaling + mean).to(self.vae.dtype)).sample.float()
        if output_type == "pt":
            return (images / 2 + 0.5).clamp(0, 1)
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return (images / 2 + 0.5).clip(0, 1)
        pixels = (255 * (images + 1) / 2).clip(0, 255).astype(np.uint8)  # truncated, as in published samples
        return [Image.fromarray(image) for image in pixels]
