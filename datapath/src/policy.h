/* SPDX-License-Identifier: Apache-2.0 */
/* What a guest may do, as control said it: checked, and a copy of our own. Immutable, as the snapshot that has it. */
#ifndef XV_POLICY_H
#define XV_POLICY_H

#include "base.h"

struct policy {
	uint32_t flags;  /* XV_POLICY_* */
	uint32_t access; /* VLAN of an access port, 0: it is none */
	bool is_trunk;
	uint64_t trunk[64]; /* a bit for each VLAN */
	uint32_t learn, nr_addresses;
	struct xv_bucket_conf tx, rx, storm;
	struct xv_ip addresses[];
};

/* 0 or -errno: -EINVAL when it contradicts itself, or a VLAN, flag or IP version is none. */
int policy_new(const struct xv_policy_conf *conf, struct policy **out);

/* Whether frames of this VLAN (frame_vlan() of them) are for the guest. */
static inline bool policy_has_vlan(const struct policy *policy, uint16_t vlan)
{
	if (policy->access)
		return vlan == policy->access;
	return !policy->is_trunk || (vlan < 4096 && policy->trunk[vlan / 64] >> vlan % 64 & 1);
}

#endif
