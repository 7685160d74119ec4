"""Mutants that change no result, and why: (module, function, change) -> reason. See mutants.py."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "stages/diffusion/few_step.py",
        "_stochastic",
        "scale * far + std * draw_noise() -> scale * far - std * draw_noise()",
    ): "the noise is symmetric, so samples have the same distribution",
    (
        "stages/losses/decoded.py",
        "PublishedLPIPS.__init__",
        "False -> True",
    ): "only whether the lpips package prints a line",
    (
        "stages/training/loop.py",
        "step_seed",
        "1 -> 2",
    ): "only the number of generated words changes, and only the first is used",
}
