"""A game of catch: a ball falls, a paddle moves left, stays or moves right, and should be below it in the end."""

import torch
from torch import Tensor

SIDE = 16  # of a frame, in pixels
PADDLE = 5  # wide
BALL = 3  # wide and high
NUM_STEPS = SIDE - BALL - 1  # until the ball touches the paddle's row
MOVES = (-1, 0, 1)  # of the paddle, by action: left, stay, right

_BALL_PLACES, _PADDLE_PLACES = SIDE - BALL + 1, SIDE - PADDLE + 1
NUM_GAMES = _BALL_PLACES * _PADDLE_PLACES  # one for each start


def every_start() -> Tensor:  # (NUM_GAMES, 3)
    """The state each game starts in: left edge of the ball, its top, left edge of the paddle, in pixels."""
    ball, paddle = (torch.arange(places, dtype=torch.int64, device="cpu") for places in (_BALL_PLACES, _PADDLE_PLACES))
    return torch.cartesian_prod(ball, torch.zeros(1, dtype=torch.int64, device="cpu"), paddle)


def step(states: Tensor, actions: Tensor) -> Tensor:  # (..., 3), (...) of 0, 1, 2 -> (..., 3)
    """The ball falls by one pixel, the paddle moves by at most one, and not beyond the edge."""
    ball, top, paddle = states.unbind(-1)
    moved = (paddle + torch.tensor(MOVES, dtype=torch.int64, device="cpu")[actions]).clamp(0, _PADDLE_PLACES - 1)
    return torch.stack([ball, top + 1, moved], -1)


def is_caught(states: Tensor) -> Tensor:  # (..., 3) -> (...)
    """Whether the middle of the ball is above the paddle."""
    ball, _, paddle = states.unbind(-1)
    middle = ball + BALL // 2
    return (middle >= paddle) & (middle < paddle + PADDLE)


def every_state() -> Tensor:  # (NUM_STEPS * NUM_GAMES, 3)
    """All states in which the paddle can still move; `number_of` says where each one is."""
    return torch.cat([every_start() + torch.tensor([0, top, 0], device="cpu") for top in range(NUM_STEPS)])


def number_of(states: Tensor) -> Tensor:  # (..., 3) -> (...)
    """The row of a state in `every_state`."""
    ball, top, paddle = states.unbind(-1)
    return (top * _BALL_PLACES + ball) * _PADDLE_PLACES + paddle


def frames(states: Tensor) -> Tensor:  # (N, 3) -> (N, SIDE, SIDE), 0 or 1
    """What the player sees: ball and paddle, white on black."""
    ball, top, paddle = (column[:, None] for column in states.unbind(1))
    pixel = torch.arange(SIDE, dtype=torch.int64, device="cpu")

    def within(start: Tensor, size: int) -> Tensor:
        return (pixel >= start) & (pixel < start + size)

    in_ball = within(top, BALL)[:, :, None] & within(ball, BALL)[:, None, :]
    in_paddle = (pixel == SIDE - 1)[None, :, None] & within(paddle, PADDLE)[:, None, :]
    return (in_ball | in_paddle).to(torch.float32)
