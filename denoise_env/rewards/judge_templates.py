"""What published judges were trained to be asked: the texts are theirs, to the letter."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreTemplate:
    """A question whose answer holds scores.

    Attributes:
        question: with ``{prompt}`` in the place of the prompt's text.
        patterns: a regular expression for each score.
        low: the score that becomes 0.
        high: the score that becomes 1.
        size: the pictures' width and height; ``None`` leaves them.
    """

    question: str
    patterns: tuple[str, ...]
    low: float
    high: float
    size: int | None = None


_UNIFIED_1_5 = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate "
    "this image based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with "
    "the provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as "
    "described in the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including "
    "clarity, detail preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, "
    "assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
_UNIFIED_2_0 = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\nProvide overall assessments for the "
    "image along the following axes (each rated from 1 to 5):\n- Alignment Score: How well the image matches the "
    "caption in terms of content.\n- Coherence Score: How logically consistent the image is (absence of visual "
    "glitches, object distortions, etc.).\n- Style Score: How aesthetically appealing the image looks, regardless "
    "of caption accuracy.\n\nOutput your evaluation using the format below:\n\nAlignment Score (1-5): X\nCoherence "
    "Score (1-5): Y\nStyle Score (1-5): Z\n\nYour task is provided as follows:\nText Caption: [{prompt}]"
)

SCORES = {
    "unified_reward_1.5": ScoreTemplate(_UNIFIED_1_5, (r"Final Score:\s*([1-5](?:\.\d+)?)(?!\d)",), 0.0, 5.0, 512),
    "unified_reward_2.0": ScoreTemplate(
        _UNIFIED_2_0,
        tuple(rf"{axis} Score \(1-5\):\s*(\d+(?:\.\d+)?)" for axis in ("Alignment", "Coherence", "Style")),
        1.0,
        5.0,
    ),
}
"""UnifiedReward (CodeGoat24/UnifiedReward): 1.5 as flow_grpo asks it (yifan123/flow_grpo, flow_grpo/rewards.py), its
score divided by 5; 2.0 as Pref-GRPO asks it (CodeGoat24/Pref-GRPO, fastvideo/rewards/templates.py), the mean of its
three scores."""

_UNIFIED_THINK = """\
You are an objective and precise evaluator for image quality comparison. I will provide you with a text caption and \
two images generated based on this caption. You must analyze the two images carefully and determine which image is \
better.

        Evaluation procedure:

        1. The caption for the generated images is: 「{prompt}」. You must evaluate the two images across these core \
dimensions:
        - Semantic consistency (how closely the image content aligns with the caption)
        - Aesthetics (composition, color usage, artistic expression)
        - Authenticity (realism and attention to detail)

        2. You are also encouraged to add up to two additional evaluation dimensions if they are relevant to the \
specific caption or images (e.g., creativity, spatial layout, fine-grained detail). If no extra dimensions are \
relevant, just keep the three core dimensions.

        3. For each evaluation dimension:
        - Provide a score between 1–10 for both Image 1 and Image 2
        - Provide a short rationale for each score (2–5 short sentences)
        - The evaluation must follow exactly this format with line breaks and indentation:
            Dimension name:\x20
                Image 1 (x/10) - rationale;\x20
                Image 2 (y/10) - rationale

        4. After evaluating all dimensions, calculate the total score for each image and show the calculation \
explicitly, following this exact format:
            Total score:
            Image 1: x+x+x=total
            Image 2: y+y+y=total

        5. Wrap all reasoning and scoring strictly within <think> and </think> tags.

        6. After </think>, output the final judgment strictly inside <answer> and </answer> tags, containing only \
one of:
        - Image 1 is better
        - Image 2 is better

        Constraints:
        - You must strictly follow the line breaks, indentation, and formatting shown in the example below.
        - Do not merge multiple dimensions into one line. Each dimension must follow the 3-line block format shown \
below.
        - Do not use Markdown formatting, bullet points, bold text, or headings.
        - Do not output explanations outside <think> and <answer>.
        - The <answer> tag must contain only the final string with no extra words.

        Required output format:

        <think>
        1. Semantic consistency:\x20
            Image 1 (9/10) - ...;\x20
            Image 2 (7/10) - ...
        2. Aesthetics:\x20
            Image 1 (8/10) - ...;\x20
            Image 2 (8/10) - ...
        3. Authenticity:\x20
            Image 1 (8/10) - ...;\x20
            Image 2 (5/10) - ...
        [Additional dimension if any]:\x20
            Image 1 (7/10) - ...;\x20
            Image 2 (8/10) - ...
        [Additional dimension if any]:\x20
            Image 1 (6/10) - ...;\x20
            Image 2 (7/10) - ...
        Total score:
        Image 1: 9+8+8+7+6=38
        Image 2: 7+8+5+8+7=35
        </think>
        <answer>Image 1 is better</answer>

        Note: The example above is only to illustrate the exact format (line breaks, indentation, symbols, and \
style). Your actual evaluation must follow this format exactly, but be based on the given caption and images.
        """

PAIRS = {"unified_reward_think": _UNIFIED_THINK}
"""UnifiedReward-Think on two images, as Pref-GRPO asks it (fastvideo/rewards/templates.py); for win_rate."""
