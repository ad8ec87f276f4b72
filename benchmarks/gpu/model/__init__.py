"""The time that the kernels are expected to take on devices that are not there: computed, not measured."""
