import pytest
from internvl_operator import settings
from internvl_operator.api import v1alpha1


@pytest.fixture
def defaults():
    return settings.Settings(
        tools_image="tools:1",
        builder_image="builder:1",
        runtime_image="runtime:1",
        backend="PyTorch",
        device="CPU",
    )


@pytest.fixture
def make_resource():
    def make(spec=None, *, name="demo", status=None, annotations=None, generation=1):
        synthetic = {"shape": "tiny", "family": "qwen2", "seed": 1}
        return v1alpha1.Resource.model_validate(
            {
                "metadata": {
                    "name": name,
                    "namespace": "ns",
                    "uid": f"uid-{name}",
                    "generation": generation,
                    "annotations": annotations or {},
                },
                "spec": {"model": {"source": {"synthetic": synthetic}}, **(spec or {})},
                "status": status or {},
            }
        )

    return make
