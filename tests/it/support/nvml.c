/* An NVML whose GPU does what the file says that FAKE_NVML_STATE names: ok, lost, hang, none,
   nodriver, unsupported, busy, "xid N" (told once for each N), or with two GPUs: two, "two xid N"; old and "old lost" (without
   the newer memory call), "recovery N", remap, retired, reset, mig and "mig lost" (only MIG devices may be asked),
   "count N", segv, abort, exit, print (on standard output), leak (files), slow (to start), "late N" (milliseconds). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNSUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9, TIMEOUT = 10,
       GPU_IS_LOST = 15, RESET_REQUIRED = 16 };
enum { XID_EVENT = 0x8 };

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct {
    void *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event_t;

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, result;
    union { double d; unsigned u; unsigned long long ull; long long sll; } value;
} field_value_t;

static unsigned long long told_xid;

static const char *state(void) {
    static __thread char text[64];
    FILE *file = fopen(getenv("FAKE_NVML_STATE"), "r");
    text[0] = 0;
    if (file) {
        if (!fgets(text, sizeof text, file)) text[0] = 0;
        fclose(file);
    }
    text[strcspn(text, "\n")] = 0;
    return text;
}

static int is(const char *name) { return strcmp(state(), name) == 0; }

int nvmlInit_v2(void) {
    while (is("slow")) usleep(10000);
    return is("nodriver") ? DRIVER_NOT_LOADED : SUCCESS;
}
int nvmlShutdown(void) {
    while (is("hang")) usleep(10000);
    return SUCCESS;
}
const char *nvmlErrorString(int code) { (void)code; return "fake"; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    snprintf(text, length, "550.00");
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    unsigned delay;
    if (is("nodriver")) return DRIVER_NOT_LOADED;
    if (sscanf(state(), "late %u", &delay) == 1) usleep(delay * 1000);
    if (sscanf(state(), "count %u", count) == 1) return SUCCESS;
    if (is("segv")) *(volatile int *)8 = 1;
    if (is("abort")) abort();
    if (is("exit")) _exit(3);
    if (is("leak")) for (int n = 0; n < 20; n++) fopen("/dev/null", "r");
    if (is("print")) { printf("{\"event\":\"ready\"}\nnonsense\n"); fflush(stdout); }
    *count = is("none") ? 0 : strncmp(state(), "two", 3) == 0 ? 2 : 1;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(unsigned long)(index + 1);
    return SUCCESS;
}
int nvmlDeviceGetIndex(void *device, unsigned *index) {
    *index = (unsigned)(unsigned long)device - 1;
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2_t *memory) {
    while (is("hang")) usleep(10000);
    if (is("lost")) return GPU_IS_LOST;
    if (is("reset")) return RESET_REQUIRED;
    if (is("unsupported") || strncmp(state(), "old", 3) == 0) return UNSUPPORTED;
    if (strncmp(state(), "mig", 3) == 0 && (unsigned long)device < 100) return NO_PERMISSION;
    if (is("mig lost")) return GPU_IS_LOST;
    memory->total = 1000;
    memory->reserved = 0;
    memory->used = is("busy") ? 1000 : 250;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *text, unsigned length) {
    (void)device;
    snprintf(text, length, "Fake GPU");
    return SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    snprintf(text, length, "GPU-fake-%lu", (unsigned long)device);
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    (void)device;
    *major = 8;
    *minor = 9;
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) {
    (void)device;
    rates->gpu = is("busy") ? 100 : 7;
    rates->memory = 3;
    return SUCCESS;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    (void)device;
    (void)sensor;
    if (is("old lost")) return GPU_IS_LOST;
    *celsius = 55;
    return SUCCESS;
}
int nvmlDeviceGetFieldValues(void *device, int count, field_value_t *values) {
    unsigned action = 0;
    (void)device;
    sscanf(state(), "recovery %u", &action);
    for (int n = 0; n < count; n++) {
        values[n].type = 1;
        values[n].result = values[n].field == 230 || values[n].field == 145 ? SUCCESS : UNSUPPORTED;
        values[n].value.u = values[n].field == 230 ? action : (unsigned)is("remap");
    }
    return SUCCESS;
}
int nvmlDeviceGetRetiredPagesPendingStatus(void *device, int *pending) {
    (void)device;
    *pending = is("retired");
    return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) {
    (void)device;
    *count = strncmp(state(), "mig", 3) == 0 ? 7 : 0;
    return SUCCESS;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **mig) {
    (void)device;
    if (index > 0) return NOT_FOUND;
    *mig = (void *)100;
    return SUCCESS;
}
int nvmlEventSetCreate(void **set) {
    *set = (void *)1;
    return SUCCESS;
}
int nvmlEventSetFree(void *set) { (void)set; return SUCCESS; }
/* The second GPU offers no events. */
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    (void)types;
    (void)set;
    return device == (void *)2 ? UNSUPPORTED : SUCCESS;
}
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned milliseconds) {
    unsigned long long xid;
    (void)set;
    (void)milliseconds;
    const char *said = state();
    if (strncmp(said, "two ", 4) == 0) said += 4;
    if (sscanf(said, "xid %llu", &xid) == 1 && xid != told_xid) {
        told_xid = xid;
    } else {
        return TIMEOUT;
    }
    memset(event, 0, sizeof *event);
    event->device = (void *)1;
    event->type = XID_EVENT;
    event->data = xid;
    return SUCCESS;
}
