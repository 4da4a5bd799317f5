"""Probes of a frozen encoder: how good are its features, without fine-tuning?"""
