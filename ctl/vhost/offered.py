# SPDX-License-Identifier: Apache-2.0
"""What of the specification is offered, and why the rest is not; docs/vhost-user.md has it all in tables."""

from __future__ import annotations

from collections.abc import Mapping

from .wire import BackendRequest, ProtocolFeature, Request

OFFERED = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
)

UNSUPPORTED: Mapping[Request, str] = {
    Request.IOTLB_MSG: "needs VIRTIO_F_ACCESS_PLATFORM, which is not offered: with `iommu_platform=on` and a virtual "
    "IOMMU QEMU refuses the device, `iommu_platform=true is not supported by the device`",
    Request.SET_VRING_ENDIAN: "needs CROSS_ENDIAN, which is not offered: guests have the host's byte order",
    Request.CREATE_CRYPTO_SESSION: "for crypto devices",
    Request.CLOSE_CRYPTO_SESSION: "for crypto devices",
    Request.POSTCOPY_ADVISE: "needs PAGEFAULT, which is not offered: a worker that touched a page on its way would "
    "wait for the network, and with it every guest it serves. QEMU refuses the capability `postcopy-ram`, saying "
    "`vhost-user backend not capable of postcopy`, and migrates by pre-copy",
    Request.POSTCOPY_LISTEN: "as POSTCOPY_ADVISE",
    Request.POSTCOPY_END: "as POSTCOPY_ADVISE",
    Request.GPU_SET_SOCKET: "for GPU devices",
    Request.VRING_KICK: "needs INBAND_NOTIFICATIONS, which is not offered: interrupts would go the other way by the "
    "socket, through control, which touches no frame; rings are kicked by descriptor, or polled",
    Request.GET_SHARED_OBJECT: "for devices with virtio-dmabuf objects",
    Request.GET_SHMEM_CONFIG: "needs SHMEM, which is not offered: a network device has no shared memory regions",
}

BACKEND_REQUESTS: Mapping[BackendRequest, str] = {
    BackendRequest.IOTLB_MSG: "never: VIRTIO_F_ACCESS_PLATFORM is not offered",
    BackendRequest.CONFIG_CHANGE_MSG: "when the configuration space has changed; without need_reply",
    BackendRequest.VRING_HOST_NOTIFIER_MSG: "never: a host notifier is a page of a device's doorbells that the guest "
    "writes to instead of leaving for the host; software has no such page",
    BackendRequest.VRING_CALL: "never: INBAND_NOTIFICATIONS is not offered",
    BackendRequest.VRING_ERR: "never: INBAND_NOTIFICATIONS is not offered",
    BackendRequest.SHARED_OBJECT_ADD: "never: SHARED_OBJECT is not offered",
    BackendRequest.SHARED_OBJECT_REMOVE: "never: SHARED_OBJECT is not offered",
    BackendRequest.SHARED_OBJECT_LOOKUP: "never: SHARED_OBJECT is not offered",
    BackendRequest.SHMEM_MAP: "never: SHMEM is not offered",
    BackendRequest.SHMEM_UNMAP: "never: SHMEM is not offered",
}

NOT_OFFERED: Mapping[ProtocolFeature, str] = {
    ProtocolFeature.CROSS_ENDIAN: "guests have the host's byte order",
    ProtocolFeature.CRYPTO_SESSION: "for crypto devices",
    ProtocolFeature.PAGEFAULT: "see POSTCOPY_ADVISE",
    ProtocolFeature.HOST_NOTIFIER: "see VRING_HOST_NOTIFIER_MSG",
    ProtocolFeature.INBAND_NOTIFICATIONS: "see VRING_KICK",
    ProtocolFeature.XEN_MMAP: "memory is mapped from files, not from Xen domains",
    ProtocolFeature.SHARED_OBJECT: "for devices with virtio-dmabuf objects",
    ProtocolFeature.GET_VRING_BASE_INFLIGHT: "GET_VRING_BASE never leaves a buffer in flight: each is used in the turn "
    "of a worker that it was taken in",
    ProtocolFeature.GPA_ADDRESSES: "new in QEMU 11.1; its number was SHMEM's in rust-vmm's crates before, so a "
    "front-end built with those would take it for that",
    ProtocolFeature.SHMEM: "a network device has no shared memory regions",
}

# For the counters: what may have become of a request, and which there are. All that aren't served are one.
OK, REFUSED, ERROR = RESULTS = ("ok", "refused", "error")
OTHER = "other"
COUNTED = (*(request.name for request in Request if request not in UNSUPPORTED), OTHER)
