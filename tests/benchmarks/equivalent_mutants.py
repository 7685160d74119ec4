"""Mutants that change no result, and why: (module, function, change) -> reason. See mutants.py."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "stages/diffusion/few_step.py",
        "_stochastic",
        "scale * far + std * draw_noise() -> scale * far - std * draw_noise()",
    ): "the noise is symmetric: samples have the same law",
    ("stages/losses/decoded.py", "PublishedLPIPS.__init__", "False -> True"): "whether the lpips package prints a line",
    ("stages/training/loop.py", "step_seed", "1 -> 2"): "how many words are generated, of which the first is taken",
}
