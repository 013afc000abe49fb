"""Dictionaries: load, train, encode, decode, select features. Nothing here knows what forgetting is."""

from excise.feature_cards import FeatureCard, FeatureCards
from sae.cards import cards
from sae.dictionary import Dictionary
from sae.load import load
from sae.match import check
from sae.statistics import FeatureStats, statistics
from sae.train import train

__all__ = ["Dictionary", "FeatureCard", "FeatureCards", "FeatureStats", "cards", "check", "load", "statistics", "train"]
