"""AutoencoderKL: the CompVis names used by the published REPA-E VAEs <-> our parameters."""

from checkpoints_tools.mapping import CONV, Entry, Table, linear, norm


def _resnet(torch, flax, shortcut):
    entries = norm(f"{torch}.norm1", f"{flax}/norm1") + norm(f"{torch}.norm2", f"{flax}/norm2")
    for name in ("conv1", "conv2", *(("nin_shortcut",) if shortcut else ())):
        entries += linear(f"{torch}.{name}", f"{flax}/{name}", CONV)
    return entries


def _attention(torch, flax):
    entries = norm(f"{torch}.norm", f"{flax}/norm")
    for name in ("q", "k", "v", "proj_out"):
        entries += linear(f"{torch}.{name}", f"{flax}/{name}", CONV)
    return entries


def _middle_and_ends(half):
    return [
        *linear(f"{half}.conv_in", f"{half}/conv_in", CONV),
        *_resnet(f"{half}.mid.block_1", f"{half}/mid_block_1", shortcut=False),
        *_attention(f"{half}.mid.attn_1", f"{half}/mid_attn_1"),
        *_resnet(f"{half}.mid.block_2", f"{half}/mid_block_2", shortcut=False),
        *norm(f"{half}.norm_out", f"{half}/norm_out"),
        *linear(f"{half}.conv_out", f"{half}/conv_out", CONV),
    ]


def vae_table(vae):
    """Conversion table of an AutoencoderKL module (its sizes are read) between CompVis names and its parameters.

    The published files may hold `loss.*`-free extras of VA-VAE's training (`foundation_model…`, `linear_proj…`); strip those
    before: unknown names are an error here.
    """
    widths = [vae.channels * multiplier for multiplier in vae.channel_multipliers]
    entries: list[Entry] = _middle_and_ends("encoder") + _middle_and_ends("decoder")
    for half, side, blocks, resample in (
        ("encoder", "down", vae.num_res_blocks, "downsample"),
        ("decoder", "up", vae.num_res_blocks + 1, "upsample"),
    ):
        before = vae.channels if half == "encoder" else widths[-1]
        levels = range(len(widths)) if half == "encoder" else reversed(range(len(widths)))
        for level in levels:
            for i in range(blocks):
                torch, flax = f"{half}.{side}.{level}", f"{half}/{side}_{level}"
                entries += _resnet(f"{torch}.block.{i}", f"{flax}_block_{i}", shortcut=before != widths[level])
                before = widths[level]
                if level in vae.attention_levels:
                    entries += _attention(f"{torch}.attn.{i}", f"{flax}_attn_{i}")
            if level != (len(widths) - 1 if half == "encoder" else 0):
                entries += linear(f"{torch}.{resample}.conv", f"{flax}_{resample}", CONV)
    entries += linear("quant_conv", "quant_conv", CONV) + linear("post_quant_conv", "post_quant_conv", CONV)
    return Table(entries)
