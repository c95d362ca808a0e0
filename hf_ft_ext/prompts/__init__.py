"""Prompts: templates, label words, their tokenisation, demonstrations, and the model that reads its mask position."""
