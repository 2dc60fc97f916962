import math

import pytest

from t2v.errors import InvalidRequest
from t2v.request import MAX_PROMPT, MAX_SEED, Request


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("prompt", "", "prompt is blank"),
        ("prompt", " \n\t", "prompt is blank"),
        ("prompt", None, "prompt must be text, not None"),
        ("prompt", 5, "prompt must be text, not 5"),
        ("prompt", "a" * (MAX_PROMPT + 1), "prompt has 10001 characters; at most 10000"),
        ("num_frames", 0, "num_frames must be a whole number from 1 to 256, not 0"),
        ("num_frames", 257, "not 257"),
        ("num_frames", 3.7, "not 3.7"),
        ("num_frames", "16", "not '16'"),
        ("num_frames", True, "not True"),
        ("num_frames", None, "not None"),
        ("num_inference_steps", 0, "num_inference_steps must be a whole number from 1 to 500, not 0"),
        ("num_inference_steps", 501, "not 501"),
        ("num_inference_steps", [50], r"not \[50\]"),
        ("fps", 0, "fps must be a whole number from 1 to 60"),
        ("fps", math.nan, "not nan"),
        ("fps", math.inf, "not inf"),
        ("seed", -1, "seed must be a whole number from 0 to 4294967295, not -1"),
        ("seed", MAX_SEED + 1, "not 4294967296"),
        ("seed", 1.8446744073709552e19, "not 1.8446744073709552e"),
        ("seed", "x" * 500, r"not 'x+\.\.\.\.$"),
        ("guidance_scale", 0.5, "guidance_scale must be a number from 1 to 30, not 0.5"),
        ("guidance_scale", math.nan, "not nan"),
        ("negative_prompt", None, "negative_prompt must be text, not None"),
        ("next_prompts", "a" * 10001, "next_prompts has 10001 characters"),
        ("next_prompts", "a|" * 16, "next_prompts holds 16 prompts; at most 15 are allowed"),
        ("scheduler", "euler", r"scheduler must be one of dpm\+\+, ddim, unipc, not 'euler'"),
        ("output_format", "avi", "output_format must be one of mp4, webm, gif, not 'avi'"),
        ("quality", 0, "quality must be a whole number from 1 to 51, not 0"),
        ("window", 3, "window must be a whole number from 4 to 128, not 3"),
        ("upscale", 3, "upscale must be a whole number from 1 to 2, not 3"),
        ("loop", 1, "loop must be true or false, not 1"),
        ("width", 100, "width must be a multiple of 8; 100 is not, 96 is"),
        ("height", 8, r"height must be a whole number from 16 to 1024 \(pixels\), not 8"),
    ],
)
def test_an_invalid_value_is_refused_in_a_sentence_that_names_it(field: str, value: object, words: str):
    with pytest.raises(InvalidRequest, match=words):
        Request(**{field: value})


def test_integral_floats_from_json_become_integers():
    request = Request(num_frames=16.0, num_inference_steps=2.0, fps=8.0, seed=7.0, guidance_scale=9)
    assert (request.num_frames, request.num_inference_steps, request.fps, request.seed) == (16, 2, 8, 7)
    assert all(type(v) is int for v in (request.num_frames, request.num_inference_steps, request.fps, request.seed))
    assert type(request.guidance_scale) is float and Request().guidance_scale is None


def test_seed_zero_is_a_seed():
    assert Request(seed=0).seed == 0


def test_a_missing_seed_is_drawn_and_kept():
    seeds = {Request().seed for _ in range(20)}
    assert len(seeds) > 15 and all(isinstance(s, int) and 0 <= s <= MAX_SEED for s in seeds)


def test_numbers_may_have_fractions():
    assert (Request(strength=0.6).strength, Request(guidance_scale=7.5).guidance_scale) == (0.6, 7.5)


def test_the_limits_are_inclusive():
    Request(
        prompt="a" * MAX_PROMPT, num_frames=1, num_inference_steps=500, fps=60, seed=MAX_SEED, width=1024, height=16
    )


def test_a_gif_has_its_own_limits():
    assert Request(output_format="gif", fps=50).fps == 50
    with pytest.raises(InvalidRequest, match="A gif shows at most 50 fps, not 60; ask for mp4 or webm"):
        Request(output_format="gif", fps=60)
    with pytest.raises(InvalidRequest, match="A gif has no quality; leave it out"):
        Request(output_format="gif", quality=30)


def test_prompts_are_split_in_order():
    assert Request("a").prompts == ["a"]
    assert Request("a | b", next_prompts=" c ||d| ").prompts == ["a | b", " c ", "d"]
