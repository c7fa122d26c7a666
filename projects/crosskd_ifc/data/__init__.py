"""Data sets: cards that describe one's own, readers, checks, the mapper, the built-in set.

Imports ``common`` and ``config``.
"""

from .card import Card, load_card
from .cards import register_card, register_cards

__all__ = ["Card", "load_card", "register_card", "register_cards"]
