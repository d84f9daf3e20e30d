"""Measuring what fusion methods have to know of a model beside its weights."""
