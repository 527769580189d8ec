"""Merging methods: pure functions of one tensor. What streams them over models is fusion's matter."""
