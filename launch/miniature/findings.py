"""Where results differ from the published ones, and why, scale by scale: written after the runs, for the pages.

An entry names a fault that was mended, a property of the scale and the experiment that shows it, or says that it is unknown.
"""

_KL = (
    "REPA-E's latents lose variance, and KL takes it: its weight has the published force at the deviation that the latents are "
    "scaled to, but reconstruction holds them less here. "
)
FOUND: dict[str, dict[str, str]] = {  # scale -> table -> text
    "digits": {
        "main": "At equal compute, as was expected. It is a property of so short a training, which the curves over steps vary: "
        "REPA's distance halves once more between 1,800 and 3,600 steps, where the paper's falls from 7.90 to 5.90 over ten "
        "times the steps. The settings of this table have six seeds. Three were planned; with them REPA-E was before REPA by "
        "-3.5 [-7.4, +0.5] after twice the steps, undecided, and the number was raised, once, to six, as announced before "
        "they ran. Two looks make a verdict by chance somewhat likelier than the 5 % of one.",
        "collapse": _KL + "In a run without KL, from the same VAE and seed, their deviation grew from 5.2 to 9.6 in 800 steps; "
        "with it, it falls to 2.5. Why reconstruction holds them less than published is unknown; there is no LPIPS here.",
        "guidance": "A scale of 2 is too much here: with 1.2, and nothing else changed, autoguidance is no worse than none. "
        "With 2 more samples are read as their class, 0.744 for 0.525 without guidance, and yet they are farther from the "
        "pictures. It is not that the weaker network is near, as was expected: after half of the steps its distance was 77, "
        "and 0.14 of its labels were right. Why 2 is too much is unknown. That the head at the tap costs was not expected, "
        "either, and no experiment here shows why: it may be that two of six blocks cannot both be aligned and predict "
        "velocities.",
        "solvers": "The verdict takes the runs of two solvers for independent, but they sample the same three networks. "
        "Network by network, DPM-Solver++ is before Euler's method, by 0.8, 1.1 and 1.0: 1.0 [0.6, 1.4].",
        "prediction": "It is the times. Errors near data weigh up to 400 times as much as at noise, and at uniform times all "
        "gradients are clipped. At JiT's times, as published, latents are the better prediction, decided. Those times help "
        "velocities, too, as the next table finds of a shift to more noise.",
        "time-shift": "RAE's formula was found for latents of more than 4096 numbers, and on these 512 it does not hold. It is "
        "training that decides, not the steps of the sampler: networks trained with more noise are as good when they are "
        "sampled without the shift, and SiT sampled with it gains nothing that three runs show. Why more noise helps in so "
        "short a training is unknown.",
        "self-flow": "REPA is before it, as expected, and as in the paper until 3M steps. Whether it is the teacher, an "
        "average of few steps, no experiment here shows.",
        "cooled": "The Frechet distance, of which nothing is published, was expected to be undecided, and is worse with the "
        "falling rate, by 4.0 [0.6, 7.4]. Why is unknown.",
        "sizes": "The row that was added for the emoji does not come out as expected here, either: on REPA-E's frozen VAE the "
        "smaller SiT has 88.1, as on the first VAE with 88.0, where the whole one gains, 31.6 for 38.4. Why is unknown.",
        "encoders": "The weak encoder, trained for 40 steps, is none that helps: with it SiT + REPA is no better than SiT "
        "without any, where all published ones help REPA. REPA-E's VAE learns to please it all the same, as was expected.",
    },
    "small": {
        "main": "REPA-E is not before REPA at twice the steps, although it aligns better, as the next table shows. Here the "
        "distance hardly depends on alignment, a property of the scale that the table of encoders shows, which varies just the "
        "encoder: with the weak one CKNNA is 0.386 for 0.483, and REPA has 26.9 for 26.5, no difference that three runs show. "
        "And the GAN may cost REPA-E what it gains: without it, after once the steps, REPA-E has 22.9, before REPA by 3.5 "
        "[0.3, 6.8] and before SiT by 5.3 [0.9, 9.6]. This pair was chosen after the runs: it suggests, and does not decide.",
        "collapse": _KL + "The digits have a run without KL, whose latents grow instead.",
        "components": "Without the GAN pictures are better here, samples by 3.7 and reconstructions by 1.3 dB. The published "
        "GAN stands beside LPIPS, which is not here, and this discriminator has 16 channels alone. Why is unknown: no "
        "experiment here varies either.",
        "sizes": "At half the width REPA-E is far behind REPA, and the row that was added contradicts what was expected of it. "
        "On REPA-E's frozen VAE the smaller SiT is behind, too, at 62.6 for 49.6 on the first VAE, by 13.1 [9.2, 16.9]. So "
        "latents need not move to be worse for a small network, though their velocity loss is lower, their "
        "alignment better, and as many samples are read as their class. It may be that they take longer: the whole SiT is "
        "behind on them after 600 steps, 45.4 for 40.5, and not after 1,200, 24.4 for 26.5. No run of the smaller one is "
        "longer, so this is a guess.",
    },
}
